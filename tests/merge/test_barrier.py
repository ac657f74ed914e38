"""The loss barrier. References: points of the line made here by hand; a permuted copy, which lies on no barrier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

from dimat import barrier, derive_symmetry, permute_weights
from dimat.errors import ConfigError, MergeError
from dimat.merge.repair.batchnorm import batchnorm
from dimat.symmetry import random_permutations

X = torch.randn(192, 6, generator=torch.Generator().manual_seed(0))
Y = (X @ torch.randn(6, 3, generator=torch.Generator().manual_seed(1))).argmax(1)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def trained(seed: int, make: Any = network) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def metrics(weights: Mapping[str, Tensor], make: Any = network) -> dict[str, float]:
    with torch.random.fork_rng():
        model = make().eval()
    with torch.no_grad():
        logits = functional_call(model, dict(weights), (X,))
    return {"loss": float(F.cross_entropy(logits, Y)), "accuracy": float((logits.argmax(1) == Y).float().mean())}


def test_points_are_those_of_the_line() -> None:
    """Reference: lerp of all floating-point tensors, BatchNorm re-estimated, at every point and at both ends."""
    one, other, model = trained(0), trained(1), network()
    (line,) = barrier(one, other, metrics, model=model, data=X, align=["none"], points=5)
    assert line.shares == (0, 0.25, 0.5, 0.75, 1)
    for share, loss, accuracy in zip(line.shares, line.metrics["loss"], line.metrics["accuracy"], strict=True):
        mean = {name: t.lerp(other[name], share) if t.is_floating_point() else t for name, t in one.items()}
        expected = metrics(batchnorm(mean, model=model, data=[(X,)]).weights)
        assert loss == pytest.approx(expected["loss"], rel=1e-5)
        assert accuracy == pytest.approx(expected["accuracy"], abs=1e-6)
    losses = line.metrics["loss"]
    rises = [loss - (1 - t) * losses[0] - t * losses[-1] for t, loss in zip(line.shares, losses)]
    assert line.barrier == max(rises) > 0.05
    assert line.moved == 0


def test_a_permuted_copy_lies_beyond_no_barrier() -> None:
    """Planted permutation: without alignment the loss rises, with it the line is a point; what is handed in stays."""
    one, model = trained(0), network()
    spec = derive_symmetry(model, (X,))
    copy = dict(permute_weights(one, spec, random_permutations(spec, torch.Generator().manual_seed(3))))
    kept = {name: tensor.clone() for name, tensor in copy.items()}
    before = torch.random.get_rng_state()
    none, activations, weights = barrier(
        one, copy, metrics, model=model, data=[X], align=("none", "activations", "weights"), points=3
    )
    assert none.barrier > 0.1
    for line in (activations, weights):
        assert line.barrier == pytest.approx(0, abs=1e-6)
        assert line.moved > 0.5
    assert all(torch.equal(copy[name], tensor) for name, tensor in kept.items())
    assert torch.equal(torch.random.get_rng_state(), before)
    again = barrier(one, copy, metrics, model=model, data=[X], align=["activations"], points=3)
    assert again[0].metrics == activations.metrics


def test_a_point_is_a_merge_in_which_everything_is_valid() -> None:
    """u, v of spectral normalisation are those of the weight half-way (by `torch.linalg.svd`), also where the second
    network is much larger."""

    def make() -> nn.Module:
        return nn.Sequential(spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))

    one, other = trained(0, make), trained(1, make)
    other["2.weight"] = 1000 * other["2.weight"]
    seen: list[Mapping[str, Tensor]] = []

    def evaluate(weights: Mapping[str, Tensor]) -> dict[str, float]:
        seen.append(dict(weights))
        return metrics(weights, make)

    barrier(one, other, evaluate, model=make(), data=[X], align=["none"], points=3)
    stem = "0.parametrizations.weight."
    weight, u, v = (seen[-1][stem + part] for part in ("original", "0._u", "0._v"))
    assert torch.allclose(weight, (one[stem + "original"] + other[stem + "original"]) / 2)
    assert float(u @ weight @ v) == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-4)


def test_a_loss_that_is_no_number_on_the_way_is_an_infinite_barrier() -> None:
    one, other = trained(0), trained(1)

    def evaluate(weights: Mapping[str, Tensor]) -> dict[str, float]:
        ends = any(torch.equal(weights["3.weight"], each["3.weight"]) for each in (one, other))
        return {"loss": 1.0 if ends else float("nan")}

    (line,) = barrier(one, other, evaluate, model=network(), data=X, align="none", points=5)
    assert line.barrier == float("inf")


def test_what_cannot_be_measured_is_told() -> None:
    one, model = trained(0), network()
    with pytest.raises(ConfigError, match="points is 2"):
        barrier(one, one, metrics, model=model, points=2)
    with pytest.raises(MergeError, match="first network's loss is missing"):
        barrier(one, one, lambda _: {"accuracy": 1.0}, model=model, data=[X])
    with pytest.raises(MergeError, match="align = 'weights' runs the networks: pass data"):
        barrier(one, one, metrics, model=model, align=["weights"], repair="none")
    with pytest.raises(ConfigError, match=r"'activation'.*did you mean 'activations'"):
        barrier(one, one, metrics, model=model, data=[X], align=["activation"])
    short, wide = ({**one, "3.bias": torch.zeros(4)}, {n: t for n, t in one.items() if n != "0.weight"})
    for other, told in ((wide, r"'0\.weight' is missing"), (short, r"'3\.bias' is \[4\], in the model \[3\]")):
        with pytest.raises(MergeError, match=f"the second network: tensor {told}"):
            barrier(one, other, metrics, model=model, data=[X])
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in one.items()}
    with pytest.raises(MergeError, match=r"the second network: tensor '0\.weight' is float16, in the model float32"):
        barrier(one, half, metrics, model=model, data=[X])
    counter = iter(range(99))
    with pytest.raises(
        MergeError, match="align = 'weights': moving units changed the second network's loss from 1 to 2"
    ):
        barrier(
            *(one, trained(1), lambda _: {"loss": float(next(counter))}),
            **{"model": model, "data": [X], "align": ["weights"]},
        )
