"""The head refitted on virtual features. References: Bayes' classifier of the Gaussians, and the repair `batchnorm`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dimat.errors import MergeError
from dimat.merge.growth import Reference
from dimat.merge.models.classifier import class_statistics
from dimat.merge.repair.batchnorm import batchnorm
from dimat.merge.repair.head import SIZE, head, refitted
from tests.merge.methods import assert_same_bits


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 6))


CENTRES = 3 * torch.randn(6, 6, generator=torch.Generator().manual_seed(9))


def drawn(classes: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels: 40 of each of these classes, about their centres."""
    labels = torch.tensor(classes).repeat_interleave(40)
    return CENTRES[labels] + torch.randn(len(labels), 6, generator=torch.Generator().manual_seed(seed)), labels


def setting() -> tuple[nn.Sequential, dict[str, Tensor], list[tuple[Tensor]], list[dict[str, Tensor]]]:
    """A network, weights, inputs of all classes, and what three agents tell: of two classes each, of six in all."""
    model = network()
    parts = [drawn([0, 1], 1), drawn([2, 3], 2), drawn([4, 5], 3)]
    data = [(torch.cat([x for x, _ in parts])[torch.randperm(240, generator=torch.Generator().manual_seed(0))],)]
    model.load_state_dict(batchnorm(dict(model.state_dict()), model=model, data=data).weights)
    told = [class_statistics(model, [((x,), y)], covariance="low-rank") for x, y in parts]
    return model, {name: tensor.clone() for name, tensor in model.state_dict().items()}, data, told


def accuracy(model: nn.Module, weights: Any, classes: list[int]) -> float:
    inputs, labels = drawn(classes, 77)
    model.load_state_dict(weights)
    with torch.no_grad():
        return float((model.eval()(inputs).argmax(1) == labels).float().mean())


def generator(seed: int = 4) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_bad_head_is_mended_by_what_agents_tell_of_their_classes() -> None:
    """An untrained head on separable features knows nothing; refitted, it tells all six classes apart, though nobody
    has more than two. Without the others' statistics it does not."""
    model, weights, data, told = setting()
    assert accuracy(model, weights, [*range(6)]) < 0.5
    mended = head(weights, model=model, data=data, aux=told, generator=generator(), pull=0.01)
    assert accuracy(model, mended.weights, [*range(6)]) > 0.95
    alone = head(weights, model=model, data=data, aux=told[:1], generator=generator(), pull=0.01)
    assert accuracy(model, alone.weights, [*range(6)]) < 0.7
    assert accuracy(model, alone.weights, [0, 1]) > accuracy(model, weights, [0, 1])


def test_all_but_the_head_is_as_batchnorm_repairs_it() -> None:
    """Reference: the repair `batchnorm`; nothing that is handed in changes, and equal generators give equal bits."""
    model, weights, data, told = setting()
    shifted = {**weights, "0.weight": 1.5 * weights["0.weight"]}
    copies, before = {name: t.clone() for name, t in shifted.items()}, torch.random.get_rng_state()
    mended = head(shifted, model=model, data=data, aux=told, generator=generator())
    reference = batchnorm(shifted, model=model, data=data)
    assert mended.images == reference.images == 240
    others = [name for name in weights if not name.startswith("3.")]
    assert_same_bits({n: mended.weights[n] for n in others}, {n: reference.weights[n] for n in others})
    assert not torch.equal(mended.weights["1.running_var"], shifted["1.running_var"])
    assert_same_bits(shifted, copies)
    assert_same_bits(dict(model.state_dict()), weights)
    assert torch.equal(torch.random.get_rng_state(), before)
    again = head(shifted, model=model, data=data, aux=told, generator=generator())
    assert_same_bits(again.weights, mended.weights)
    other = head(shifted, model=model, data=data, aux=told, generator=generator(5))
    assert not torch.equal(other.weights["3.weight"], mended.weights["3.weight"])
    assert {t.dtype for t in mended.weights.values()} == {t.dtype for t in weights.values()}


def test_rows_of_classes_that_nobody_has_stay_and_so_does_the_level_of_the_others() -> None:
    """Bit for bit; the mean of the other rows and biases is as before."""
    model, weights, data, told = setting()
    mended = head(weights, model=model, data=data, aux=told[:2], generator=generator()).weights
    for name in ("3.weight", "3.bias"):
        assert torch.equal(mended[name][4:], weights[name][4:])
        assert not torch.allclose(mended[name][:4], weights[name][:4])
        torch.testing.assert_close(mended[name][:4].mean(0), weights[name][:4].mean(0), rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    classes=st.integers(2, 6),
    features=st.integers(1, 8),
    pull=st.floats(0.01, 10),
    steps=st.integers(1, 30),
    bias=st.booleans(),
    size=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_a_fit_never_makes_the_cross_entropy_worse_and_goes_no_further_than_its_bound(
    seed: int, classes: int, features: int, pull: float, steps: int, bias: bool, size: float
) -> None:
    """Laws of a descent from the start with a pull to it: both follow from the objective being no larger at the end."""
    g = torch.Generator().manual_seed(seed)
    x = size * (torch.randn(60, features, generator=g) + 1)
    x[:, -1] *= 0 if seed % 3 == 0 else 1  # a unit that never fires
    y = torch.randint(classes, (60,), generator=g)
    y[:2] = torch.tensor([0, classes - 1])
    w, b = torch.randn(classes, features, generator=g) / size, torch.randn(classes, generator=g) if bias else None

    def fault(weight: Tensor, shift: Tensor | None) -> float:
        present = y.unique()
        logits = x.double() @ weight.double().mT + (0 if shift is None else shift.double())
        return float(cross_entropy(logits[:, present], torch.searchsorted(present, y)))

    new, shift = refitted(w, b, x, y, steps=steps, pull=pull)
    before, after = fault(w, b), fault(new, shift)
    assert after <= before + 1e-9
    scale = x.double().square().mean(0).sqrt()
    moved = ((new - w.double()) * scale).square().sum() + (
        0 if shift is None or b is None else (shift - b).square().sum()
    )
    assert float(moved) <= 2 * before / pull * (1 + 1e-6)
    assert new.isfinite().all()


def test_a_fit_is_the_best_classifier_of_gaussians_that_differ_in_mean_alone() -> None:
    """Reference: Bayes' rule for N(μ_c, I), which is linear: W = μ, b = −|μ|²/2. On fresh draws the fit agrees."""
    g = generator(0)
    centres = 2 * torch.randn(5, 4, generator=g, dtype=torch.float64)
    labels = torch.arange(5).repeat_interleave(4000)
    x = centres[labels] + torch.randn(len(labels), 4, generator=g, dtype=torch.float64)
    w, b = refitted(torch.zeros(5, 4), torch.zeros(5), x, labels, steps=200, pull=1e-6)
    assert b is not None
    fresh = centres[labels] + torch.randn(len(labels), 4, generator=g, dtype=torch.float64)
    bayes = (fresh @ centres.mT - centres.square().sum(1) / 2).argmax(1)
    assert float(((fresh @ w.mT + b).argmax(1) == bayes).double().mean()) > 0.97


def test_a_fit_makes_the_head_no_larger_than_own_training_has() -> None:
    """With a reference, weight and bias end at most at `SIZE` times its norms; without, this fit goes beyond. It is a
    part of the same way."""
    model, weights, data, told = setting()
    free = head(weights, model=model, data=data, aux=told, generator=generator(), pull=0.01).weights
    norms = {name: float(tensor.norm()) for name, tensor in weights.items() if tensor.is_floating_point()}
    reference = Reference(norms, {n: weights[n].numel() for n in norms}, dict.fromkeys(norms, 0.0))
    assert any(float(free[n].norm()) > SIZE * norms[n] for n in ("3.weight", "3.bias"))
    held = head(weights, model=model, data=data, aux=told, generator=generator(), pull=0.01, reference=reference)
    ratios = {n: float(held.weights[n].norm()) / norms[n] for n in ("3.weight", "3.bias")}
    assert max(ratios.values()) <= SIZE * (1 + 1e-5)
    shares = [(held.weights[n] - weights[n]).norm() / (free[n] - weights[n]).norm() for n in ("3.weight", "3.bias")]
    assert 0.01 < float(shares[0]) < 1
    torch.testing.assert_close(shares[0], shares[1], rtol=1e-3, atol=1e-3)


def test_a_single_class_leaves_the_head_as_it_is() -> None:
    """There is nothing to tell apart."""
    w, b = torch.randn(3, 4, generator=generator()), torch.zeros(3)
    new, shift = refitted(w, b, torch.ones(5, 4), torch.full((5,), 2), steps=5, pull=1.0)
    assert shift is not None
    assert torch.equal(new, w.double())
    assert torch.equal(shift, b.double())


def test_missing_statistics_and_generators_are_told() -> None:
    """Bad input: one line each that says what to hand in."""
    model, weights, data, told = setting()
    for aux in (None, [], [told[0], {}], [{}, told[0]]):
        with pytest.raises(MergeError, match=r"needs every model's statistics: see models\.classifier"):
            head(weights, model=model, data=data, aux=aux, generator=generator())
    with pytest.raises(MergeError, match=r"draws at random: pass a seeded generator="):
        head(weights, model=model, data=data, aux=told)
