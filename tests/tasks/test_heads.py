"""The fixed simplex head. References: the definition of a simplex equiangular tight frame, and verified symmetries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from dimat import merge_weights, run_simulation
from dimat.config import ExperimentConfig, TaskConfig, build
from dimat.errors import ConfigError
from dimat.symmetry import derive_symmetry, permute_weights, random_permutations, verify_symmetry
from dimat.tasks import DigitsCNN, ImageCNN, load_task, mlp, resnet20, seeded
from dimat.tasks.heads import SimplexHead, simplex

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "digits": (lambda: DigitsCNN(width=8, head="simplex"), (1, 8, 8)),
    "images": (lambda: ImageCNN(width=8, head="simplex"), (3, 16, 16)),
    "resnet20": (lambda: resnet20(head="simplex"), (3, 16, 16)),
    "narrow mlp": (lambda: mlp((12, 16, 5, 10), "simplex"), (12,)),
}


@settings(max_examples=20, deadline=None)
@given(classes=st.integers(2, 60))
def test_rows_are_a_regular_simplex_that_nobody_draws(classes: int) -> None:
    """Definition: unit rows, all cosines −1/(C − 1), rows that sum to 0, and WᵀW = C/(C − 1) I (a tight frame)."""
    torch.manual_seed(classes)
    before = torch.get_rng_state()
    rows = simplex(classes)
    assert torch.equal(before, torch.get_rng_state())
    cosines = torch.full((classes, classes), -1 / (classes - 1), dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(rows @ rows.mT, cosines, rtol=0, atol=1e-12)
    torch.testing.assert_close(rows.sum(0), torch.zeros(classes - 1, dtype=torch.float64), rtol=0, atol=1e-12)
    frame = torch.eye(classes - 1, dtype=torch.float64) * classes / (classes - 1)
    torch.testing.assert_close(rows.mT @ rows, frame, rtol=0, atol=1e-12)


def test_one_class_is_refused() -> None:
    """Bad input: there is no simplex of one point."""
    with pytest.raises(ConfigError, match='head = "simplex" needs two classes or more, the task has 1') as caught:
        SimplexHead(4, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", MODELS)
def test_the_simplex_is_the_same_for_all_seeds_and_is_not_trained(name: str) -> None:
    """No parameter, no entry of the state dict; a step of training moves the map to it and leaves it as it is."""
    factory, shape = MODELS[name]
    one, other = (seeded(factory)(torch.Generator().manual_seed(seed)) for seed in (0, 1))
    heads = [next(m for m in model.modules() if isinstance(m, SimplexHead)) for model in (one, other)]
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[0].project.weight, heads[1].project.weight)
    mapped = [n for n, p in one.named_parameters() if p is heads[0].project.weight]
    assert [n for n in one.state_dict() if n.startswith(mapped[0].removesuffix("project.weight"))] == mapped
    x, y = torch.randn(8, *shape), torch.arange(8)
    optimizer, before = torch.optim.SGD(one.parameters(), 0.1), heads[0].project.weight.clone()
    nn.functional.cross_entropy(one(x), y).backward()
    optimizer.step()
    assert torch.equal(heads[0].weight, simplex(10).float())
    assert not torch.equal(heads[0].project.weight, before)
    assert one(x).shape == (8, 10)
    torch.testing.assert_close(one(x).sum(1), torch.zeros(8), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_symmetries_of_the_network_are_found_and_hold(name: str) -> None:
    """Reference: `verify_symmetry` in float64. The features before the map can be permuted, the simplex cannot."""
    factory, shape = MODELS[name]
    model = seeded(factory)(torch.Generator().manual_seed(0)).eval()
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    spec = derive_symmetry(model, (x,))
    assert spec.warnings == ()
    moving = {(axis.tensor.rpartition("project.")[2], axis.dim) for axis in spec.axes if "project" in axis.tensor}
    assert moving == {("weight", 1)}
    assert verify_symmetry(model, spec, (x,), torch.Generator().manual_seed(2)) < 1e-9


def test_a_merge_with_a_permuted_copy_is_the_model() -> None:
    """Exactness rule, with alignment and re-estimated statistics: logits are what they were."""
    factory, shape = MODELS["digits"]
    model = seeded(factory)(torch.Generator().manual_seed(0))
    x = torch.randn(128, *shape, generator=torch.Generator().manual_seed(1))
    own = {n: t.clone() for n, t in model.state_dict().items()}
    spec = derive_symmetry(model.eval(), (x[:2],))
    peer = permute_weights(own, spec, random_permutations(spec, torch.Generator().manual_seed(3)))
    assert not torch.equal(own["fc.project.weight"], peer["fc.project.weight"])
    merged = merge_weights(own, [peer], [0.5, 0.5], "dimat", model=model, data=[x], repair="none")
    assert all(torch.allclose(merged[n], t, atol=1e-6) for n, t in own.items())


def test_tasks_have_it_by_an_option_and_agents_keep_it(tmp_path: Path) -> None:
    """`task.options.head` in a network: all agents end with the same fixed head, and what they send has none of it."""
    tree: dict[str, Any] = {
        "topology": {"graph": "ring", "agents": 3},
        "task": {"name": "digits", "options": {"head": "simplex", "width": 4}},
        "train": {"steps_per_round": 3},
        "schedule": {"rounds": 2},
        "simulate": {"workers": 1},
    }
    results = run_simulation(build(ExperimentConfig, tree, "the test"), out=tmp_path / "run")
    assert results.status == "done"
    for agent in results.agents:
        weights = load_file(tmp_path / "run" / "final" / f"{agent}.safetensors")
        assert "fc.weight" not in weights
        assert weights["fc.project.weight"].shape == (9, 8)


def test_the_ordinary_head_is_the_default_and_other_names_are_told() -> None:
    """Equal draws give the networks of before; an unknown head is one line with what there is."""
    plain = load_task(TaskConfig(name="digits")).build_model(torch.Generator().manual_seed(0))
    assert isinstance(plain.fc, nn.Linear)
    tower = load_task(TaskConfig(name="digits", options={"model": "mlp", "head": "simplex"}))
    last = [*tower.build_model(torch.Generator().manual_seed(0)).children()][-1]
    assert isinstance(last, SimplexHead)
    with pytest.raises(ConfigError, match="'linear' or 'simplex'") as caught:
        load_task(TaskConfig(name="digits", options={"head": "etf"}))
    assert "\n" not in str(caught.value)
