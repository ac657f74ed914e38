"""Models that keep in eval mode what they derive from weights: what is computed is of the weights that they have now.

References: models that are built anew with those weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dimat.config import TrainConfig
from dimat.merge.models.fisher_information import empirical_fisher
from dimat.merge.models.functional import reading_inputs
from dimat.merge.repair.batchnorm import batchnorm
from dimat.symmetry import derive_symmetry, random_permutations
from dimat.symmetry.trace import eval_mode, forget_derived
from dimat.tasks import ClassificationTask, TensorData
from dimat.train.trainer import Trainer
from tests.symmetry.wide import ENTRIES
from tests.symmetry.wide.entry import build

IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
DATA = TensorData(IMAGES, torch.arange(4))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def levit(_: torch.Generator | None = None) -> nn.Module:
    """LeViT, whose attention keeps biases that it gathered from its parameters."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed (it is in the extra `dev`)")
    return build(ENTRIES["levit_128s"])[0]


class Keeps(nn.Module):
    """A layer that keeps a scaled matrix from its first eval-mode run until it is put into training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))
        self.norm = nn.BatchNorm1d(3)
        self._kept: Tensor | None = None

    def train(self, mode: bool = True) -> Keeps:
        super().train(mode)
        if mode:
            self._kept = None
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.norm(x @ (2 * self.weight))
        if self._kept is None:
            self._kept = 2 * self.weight
        return self.norm(x @ self._kept)


def other_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights that differ most where models keep what they derive, in biases of attention. Norms at the end of each
    branch start at 0 and would hide it: all get 1. The head gets larger, so that losses tell."""
    draw = generator(2)
    weights = dict(model.state_dict())
    for name, tensor in weights.items():
        if "attention_biases" in name:
            weights[name] = 3 * torch.randn(tensor.shape, generator=draw)
        elif name.endswith("bn.weight"):
            weights[name] = torch.ones_like(tensor)
        elif name.startswith("head") and name.endswith("linear.weight"):
            weights[name] = 1e5 * tensor
    return weights


def trainer() -> Trainer:
    task = ClassificationTask("four", levit, DATA, DATA, DATA, tuple("abcd"))
    settings = TrainConfig.model_validate({"device": "cpu", "batch_size": 4})
    return Trainer(task, DATA, settings, seed=0, path=("agent", 0), rounds_total=1)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IMAGES)


@contextmanager
def unchanged(model: nn.Module, run: Callable[[], Tensor]) -> Iterator[None]:
    """Inside, anything may be done with the model at other weights; after that it computes what it did before."""
    before = run()
    yield
    torch.testing.assert_close(run(), before)


def test_evaluation_after_loading_weights_is_of_these_weights() -> None:
    """Reference: a trainer that was never at other weights. All calls are in eval mode, none trains in between."""
    worker, fresh = trainer(), trainer()
    before = worker.evaluate(DATA)
    worker.model.eval()
    first = outputs(worker.model)
    weights = other_weights(worker.model)
    fresh.load_weights(weights)
    expected = fresh.evaluate(DATA)
    fresh.model.eval()
    assert abs(expected["loss"] - before["loss"]) > 0.1, "the weights must matter"
    assert worker.evaluate(DATA, weights) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(outputs(worker.model), first), "the model still has its own weights"
    worker.load_weights(weights)
    assert torch.equal(outputs(worker.model), outputs(fresh.model)), "outside of evaluate too"
    assert worker.evaluate(DATA) == pytest.approx(expected, rel=1e-5)


def test_a_permuted_model_computes_what_it_did() -> None:
    """Reference: the model before; the biases of heads move along, so kept ones would be those of other heads."""
    worker = trainer()
    worker.load_weights(other_weights(worker.model))
    worker.model.eval()
    spec = derive_symmetry(worker.model, (IMAGES[:2],))
    before = outputs(worker.model)
    permutations = random_permutations(spec, generator())
    assert any("attention_biases" in tensor for group in permutations for tensor, _ in spec.group(group).axes)
    worker.permute(spec, permutations)
    torch.testing.assert_close(outputs(worker.model), before, rtol=1e-4, atol=1e-4)


def test_running_at_other_weights_leaves_nothing_behind() -> None:
    """Reference: the model before. Through every way in which merging runs a model at weights that it does not have."""
    model = Keeps().eval()
    x = torch.randn(6, 3, generator=generator())
    with torch.no_grad():
        model.norm.weight.fill_(1.5)
    other = {name: 5 * t + 1 if t.is_floating_point() else t for name, t in model.state_dict().items()}

    def run() -> Tensor:
        return model(x).detach()

    with unchanged(model, run):
        batchnorm(other, model=model, data=[(x,)])
    with unchanged(model, run):
        empirical_fisher(model, [(x, torch.arange(6) % 3)], loss=F.cross_entropy, weights=other)
    with unchanged(model, run), reading_inputs(model, {}):
        functional_call(model, other, (x,))
    with unchanged(model, run), eval_mode(model):
        functional_call(model, other, (x,))
    assert not any(module.training for module in model.modules())


def test_what_merging_finds_out_at_other_weights_is_theirs() -> None:
    """Reference: a model that has those weights, and has never run."""
    x, labels = torch.randn(40, 3, generator=generator()), torch.arange(40) % 3
    used, fresh = Keeps().eval(), Keeps()
    used(x)
    other = {name: 5 * t + 1 if t.is_floating_point() else t for name, t in used.state_dict().items()}
    fresh.load_state_dict(other)
    repaired = [batchnorm(other, model=model, data=[(x,)]).weights for model in (used, fresh)]
    assert all(torch.equal(repaired[0][name], tensor) for name, tensor in repaired[1].items())
    assert not torch.equal(repaired[0]["norm.running_var"], other["norm.running_var"])
    found = [empirical_fisher(m, [(x, labels)], loss=F.cross_entropy, weights=other) for m in (used, fresh)]
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())
    assert float(found[0]["fisher.weight"].abs().sum()) > 0, "the kept matrix has a gradient"


def test_forgetting_leaves_every_modules_mode() -> None:
    """Reference: by hand."""
    model = nn.Sequential(Keeps(), nn.Sequential(Keeps(), nn.Dropout()))
    model[1].eval()
    model[1][1].train()
    modes = [module.training for module in model.modules()]
    model[1][0](torch.randn(5, 3, generator=generator()))
    assert model[1][0]._kept is not None
    forget_derived(model)
    assert model[1][0]._kept is None
    assert [module.training for module in model.modules()] == modes
