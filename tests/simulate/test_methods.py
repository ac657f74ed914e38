"""Every registered combine method in a network: a run of a few agents on digits, with and without alignment.

The registry is gone through by name, so a new method is covered by being registered. References: the run's own record
of what was merged, and the same run once more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dimat import events
from dimat.config import ExperimentConfig, build
from dimat.events import Event
from dimat.merge.registry import combine_registry
from dimat.simulate import run_simulation
from tests.merge.combine.test_combine_laws import needs

METHODS = combine_registry.names()
ALIGN = ("none", "activations")
SEED = 3

NOT_HERE = {"lora-": "it merges the pairs of factors of LoRA adapters, and the model of digits has none"}
"""Beginning of a method's name → why no network on digits merges by it."""


def options(method: str) -> dict[str, Any]:
    """Return the options of a quick run: methods that learn take few steps."""
    return {"steps": 4} if "steps" in combine_registry.options(method) else {}


def experiment(method: str, align: str) -> ExperimentConfig:
    """All start from the base. Two agents where a method merges pairs, else three of which one hears two."""
    agents = 1 + max(needs(method).peers, 1)
    tree = {
        "seed": SEED,
        "topology": {"graph": "path", "agents": agents},
        "task": {"name": "digits", "options": {"width": 4}},
        "train": {"steps_per_round": 4, "initialisation": "shared"},
        "merge": {
            "method": "average",
            "align": {"name": align, "options": {"max_images": 32} if align == "activations" else {}},
            "combine": {"name": method, "options": options(method)},
            "repair": {"name": "batchnorm", "options": {"max_images": 64}},
            "base": {"seed": SEED},
            "statistics_samples": 32,
        },
        "schedule": {"rounds": 2},
        "simulate": {"workers": 1, "evaluate": "after"},
    }
    return build(ExperimentConfig, tree, "the test")


def run(method: str, align: str, out: Path) -> tuple[list[Event], dict[str, dict[str, Tensor]]]:
    """Run, and check what holds for every method; return what was told and the final weights."""
    for beginning, reason in NOT_HERE.items():
        if method.startswith(beginning):
            pytest.skip(f"{method}: {reason}")
    heard: list[Event] = []
    config = experiment(method, align)
    results = run_simulation(config, out=out, listeners=[heard.append])
    assert results.status == "done"
    assert len(results.rows) == 2 * len(results.agents)
    for row in results.rows:
        assert row.heard == row.expected > 0
        assert row.accepted == 1
        assert row.after is not None
        assert 0 <= row.after <= 1
    assert not [fact for fact in heard if isinstance(fact, events.PeerRefused | events.PeerLate)]
    return heard, {name: load_file(out / "final" / f"{name}.safetensors") for name in results.agents}


@pytest.mark.parametrize("align", ALIGN)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_in_a_network(tmp_path: Path, method: str, align: str) -> None:
    """It ends, merges all whom it hears, and leaves finite weights of the task's model."""
    _, weights = run(method, align, tmp_path / "run")
    for model in weights.values():
        assert model["fc.weight"].shape == (10, 8)
        assert all(tensor.isfinite().all() for tensor in model.values())


@pytest.mark.parametrize(("method", "align"), [("dare-ties", "none"), ("opcm", "activations"), ("fisher", "none")])
def test_equal_seeds_give_equal_bits(tmp_path: Path, method: str, align: str) -> None:
    """One that draws, one that keeps a state, one with statistics."""
    _, once = run(method, align, tmp_path / "once")
    _, again = run(method, align, tmp_path / "again")
    assert all(torch.equal(again[a][k], tensor) for a, model in once.items() for k, tensor in model.items())
