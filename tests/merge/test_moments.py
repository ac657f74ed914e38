"""Moments merged. References: plain means by hand, Adam's own averages of gradients, planted permutations, liars."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dimat.errors import PeerError
from dimat.merge.growth import Reference
from dimat.merge.moments import (
    MergedMoments,
    PeerMoments,
    check_moments,
    limit_of,
    norms_of_moments,
    reference_of,
    spec_of_moments,
)
from dimat.symmetry import derive_symmetry, invert_permutations, permute_weights, random_permutations
from dimat.tasks import mlp
from dimat.weights.moments import MOMENT, SCALE, encode_moments

BETAS = (0.9, 0.999)
SHAPES = {"0.weight": (40, 30), "0.bias": (40,)}
Moments = dict[str, Tensor]


def adams(seed: int, steps: int) -> Moments:
    """Return Adam's moments of some steps with random gradients, by its formulas; those of an element have the same
    size whatever the seed, over several powers of ten."""
    generator, sizes = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    found: Moments = {}
    for name, shape in SHAPES.items():
        first, second = torch.zeros(shape), torch.zeros(shape)
        scale = torch.pow(10.0, torch.randn(shape, generator=sizes) / 2)
        for _ in range(steps):
            gradient = torch.randn(shape, generator=generator) * scale
            first = BETAS[0] * first + (1 - BETAS[0]) * gradient
            second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        found |= {f"exp_avg.{name}": first, f"exp_avg_sq.{name}": second, f"step.{name}": torch.tensor(float(steps))}
    return found


def merged(
    own: Moments,
    weight: float,
    peers: dict[str, tuple[float, dict[str, Tensor]]],
    *,
    share: float = 1.0,
    ratio: float = 10.0,
    reference: Reference | None = None,
) -> MergedMoments:
    theirs = [PeerMoments(name, part, tensors) for name, (part, tensors) in peers.items()]
    bound = reference or reference_of(norms_of_moments(own), own)
    return MergedMoments(own, weight, theirs, None, bound, ratio=ratio, limit=limit_of(BETAS), share=share)


WEIGHTS = {name: torch.zeros(shape) for name, shape in SHAPES.items()}


@given(st.integers(0, 1000), st.floats(0.05, 0.9), st.floats(0.1, 1))
def test_the_mean_is_the_plain_mean(seed: int, weight: float, share: float) -> None:
    """Sent in fp32: own + s (Σ w_i m_i − own), to a rounding, for first and second moments; nothing is bounded among
    agents that are alike, and what is averaged of squares is not negative."""
    own, *others = (adams(seed + k, 20) for k in range(3))
    parts = [weight, (1 - weight) * 0.4, (1 - weight) * 0.6]
    peers = {f"p{k}": (parts[k], encode_moments(other, "fp32")) for k, other in enumerate(others, start=1)}
    found = merged(own, weight, peers, share=share)
    for name, tensor in found.items():
        mean = sum(part * each[name].double() for part, each in zip(parts, (own, *others), strict=True))
        expected = own[name].double() + share * (mean - own[name].double())
        terms = sum(each[name].double().abs() for each in (own, *others))
        assert bool(((tensor - expected).abs() <= 1e-6 * terms).all())
        assert not name.startswith("exp_avg_sq") or bool((tensor >= 0).all())
    assert found.exceeded == {}


@given(st.integers(0, 1000))
def test_codes_in_eight_bits_are_close(seed: int) -> None:
    """Roots of second moments are off by 4.4 % at most, first moments by that share of the most that they may be,
    `limit_of`; the peer has half of it."""
    own, other = adams(seed, 20), adams(seed + 1, 20)
    exact = merged(own, 0.5, {"p": (0.5, encode_moments(other, "fp32"))})
    close = merged(own, 0.5, {"p": (0.5, encode_moments(other, "int8"))})
    for name in SHAPES:
        first, second = f"exp_avg.{name}", f"exp_avg_sq.{name}"
        root = exact[second].sqrt()
        assert bool((close[second].sqrt() / root - 1).abs().max() < 0.045)
        peers = other[second].sqrt() * limit_of(BETAS)
        assert bool(((close[first] - exact[first]).abs() <= 0.5 * 0.045 * peers + 1e-7).all())


def test_counts_of_steps() -> None:
    """Agents in step keep their count; else it is the rounded mean, and with it Adam's corrections are those of the
    mean of moments to first order: (1 − βᵗ) = Σ w_i (1 − β^t_i)."""
    own, same, other = adams(0, 100), adams(1, 100), adams(2, 108)
    third = 1 / 3
    kept = merged(own, third, {"p": (third, encode_moments(same, "int8")), "q": (third, encode_moments(same, "int8"))})
    assert kept["step.0.weight"] == 100
    mixed = merged(own, 0.75, {"p": (0.25, encode_moments(other, "int8"))})
    assert mixed["step.0.weight"] == 102
    exact = 0.75 * (1 - BETAS[1] ** 100) + 0.25 * (1 - BETAS[1] ** 108)
    assert 1 - BETAS[1] ** 102 == pytest.approx(exact, rel=1e-3)


def test_what_a_peer_has_not_is_own() -> None:
    """A peer that has trained nothing, or not this parameter: what it would have had is own's; own state that is not
    there is not made."""
    own, other = adams(0, 20), adams(1, 20)
    half = {name: tensor for name, tensor in other.items() if name.endswith("bias")}
    found = merged(own, 0.5, {"none": (0.25, {}), "half": (0.25, encode_moments(half, "fp32"))})
    assert torch.equal(found["exp_avg.0.weight"], own["exp_avg.0.weight"])
    expected = 0.75 * own["exp_avg.0.bias"] + 0.25 * other["exp_avg.0.bias"]
    torch.testing.assert_close(found["exp_avg.0.bias"], expected)
    assert [*merged({}, 0.5, {"p": (0.5, encode_moments(other, "fp32"))})] == []


MODEL = mlp((6, 40, 8, 4))
SPEC = derive_symmetry(MODEL, (torch.randn(2, 6, generator=torch.Generator().manual_seed(0)),))


@given(st.integers(0, 1000))
def test_averaging_commutes_with_a_permutation(seed: int) -> None:
    """A peer whose units are in another order, with what brings them into own's: as if it had been in that order."""
    spec, weights = SPEC, {name: parameter.detach() for name, parameter in MODEL.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    planted = random_permutations(spec, generator)

    def moments() -> Moments:
        first = {f"exp_avg.{n}": torch.randn(w.shape, generator=generator) for n, w in weights.items()}
        second = {f"exp_avg_sq.{n}": first[f"exp_avg.{n}"].square() for n in weights}
        return {**first, **second, **{f"step.{n}": torch.tensor(5.0) for n in weights}}

    own, peer = moments(), moments()
    away = permute_weights(peer, spec_of_moments(peer, spec), planted)
    assert any(not torch.equal(away[name], peer[name]) for name in peer)
    back = invert_permutations(planted, spec)
    bound = reference_of(norms_of_moments(own), own)
    ways = [("p", encode_moments(peer, "fp32"), {}), ("p", encode_moments(away, "fp32"), back)]
    one, two = (MergedMoments(own, 0.5, [PeerMoments(n, 0.5, t, p)], spec, bound, ratio=10.0) for n, t, p in ways)
    assert all(torch.equal(one[name], two[name]) for name in own)


def test_limits_of_adams_first_moment() -> None:
    """The bound by Cauchy and Schwarz, reached by the gradients that it names; none where β₁² ≥ β₂."""
    limit = limit_of(BETAS)
    assert limit == pytest.approx(7.27, abs=0.01)
    assert limit_of((0.99, 0.9)) == float("inf")
    first = second = 0.0
    for k in range(500, -1, -1):  # the k-th gradient from the end, by which the inequality is an equality
        gradient = (BETAS[0] / BETAS[1]) ** k
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
    assert first / second**0.5 == pytest.approx(limit, rel=1e-6)


@pytest.mark.parametrize("entry", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("encoding", ["int8", "fp32"])
def test_a_peer_with_huge_moments_moves_little(entry: str, encoding: str) -> None:
    """A million times as large: taken at ten times own training's norm, so that the agent is not frozen; the step of no
    parameter is larger than Adam's ever is, and it is told how large they were. The reference is not own's of now: a
    liar gains nothing by being there round after round."""
    own, lie = adams(0, 20), adams(1, 20)
    for name, tensor in lie.items():
        if name.startswith(f"{entry}."):
            tensor *= 1e6 if entry == "exp_avg" else 1e12
    bound = reference_of(norms_of_moments(own), own)
    now = own
    for _ in range(6):
        found = merged(now, 0.5, {"liar": (0.5, encode_moments(lie, encoding))}, reference=bound)
        now = {name: tensor.clone() for name, tensor in found.items()}
        assert found.exceeded["liar"] > 1e4
    norms, before = norms_of_moments(now), norms_of_moments(own)
    for name in SHAPES:
        assert norms[f"exp_avg_sq.{name}"] <= 10.001 * bound.usual(f"exp_avg_sq.{name}")
        assert norms[f"exp_avg.{name}"] <= 10.001 * bound.usual(f"exp_avg.{name}")
        ratio = now[f"exp_avg.{name}"].abs() / now[f"exp_avg_sq.{name}"].sqrt()
        assert float(ratio.max()) <= limit_of(BETAS) * 1.001
    assert before["step.0.bias"] == 20 == norms["step.0.bias"]


def test_a_first_moment_without_its_second_is_cut_off() -> None:
    """The liar's second moments are 0 where its first ones are large, and so are ours: no step of infinite size."""
    own, lie = adams(0, 20), adams(1, 20)
    own["exp_avg_sq.0.bias"][:5] = own["exp_avg.0.bias"][:5] = 0
    lie["exp_avg_sq.0.bias"][:5] = 0
    lie["exp_avg.0.bias"][:5] = lie["exp_avg.0.bias"].abs().max()
    found = merged(own, 0.5, {"liar": (0.5, encode_moments(lie, "fp32"))})
    assert bool((found["exp_avg.0.bias"][:5] == 0).all())


def test_centred_rmsprop_stays_a_variance() -> None:
    """square_avg − grad_avg² is a variance before, and after any merge: its root is taken."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(50, 40, generator=generator)
    own = {"square_avg.0.weight": mean**2 + 1e-3, "grad_avg.0.weight": mean}
    lie = encode_moments({"square_avg.0.weight": own["square_avg.0.weight"], "grad_avg.0.weight": mean * 3}, "int8")
    for peer in (encode_moments(own, "int8"), lie):
        found = merged(own, 0.3, {"p": (0.7, peer)})
        assert bool((found["square_avg.0.weight"] - found["grad_avg.0.weight"] ** 2 > 0).all())


OWN = adams(0, 20)
NONE = "agents must train with the same train.optimizer"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{MOMENT}exp_avg.0.bias": torch.zeros(41)}, "moment 'exp_avg.0.bias' is [41], expected [40]"),
        ({f"{MOMENT}exp_avg.0.bias": torch.full((40,), float("nan"))}, "'exp_avg.0.bias' holds values that are"),
        ({f"{SCALE}exp_avg.0.weight": torch.full((5,), -1.0)}, "scales of 'exp_avg.0.weight' are not between 0"),
        ({f"{MOMENT}exp_avg_sq.0.bias": None}, f"moment 'exp_avg_sq.0.bias' is missing; {NONE}"),
        ({f"{MOMENT}step.0.bias": None}, f"moment 'step.0.bias' is missing; {NONE}"),
        ({f"{MOMENT}max_exp_avg_sq.0.bias": torch.zeros(40)}, "'max_exp_avg_sq.0.bias' is not one of this agent's"),
        ({f"{MOMENT}momentum_buffer.0.bias": torch.zeros(40)}, "'momentum_buffer.0.bias' is not one of this agent's"),
        ({f"{MOMENT}exp_avg.1.bias": torch.zeros(40)}, "moment 'exp_avg.1.bias' is not one of this agent's"),
        ({f"{MOMENT}": torch.zeros(40)}, "moment '' is not one of this agent's"),
        ({f"{SCALE}exp_avg.9": torch.zeros(40)}, "'moment-scale.exp_avg.9' are scales without a moment"),
    ],
)
def test_what_a_peer_may_not_send(change: dict[str, Tensor | None], said: str) -> None:
    """One fault each; one line, with the peer's name."""
    sent = {**encode_moments(adams(1, 20), "int8"), **change}
    with pytest.raises(PeerError, match=f"^lab-b: .*{re.escape(said)}") as told:
        check_moments("lab-b", {name: t for name, t in sent.items() if t is not None}, WEIGHTS, OWN)
    assert "\n" not in str(told.value)


def test_what_a_peer_may_send() -> None:
    """All, nothing, or parameters that we have no moments of; to who has none at all, entries that are known."""
    sent = encode_moments(adams(1, 20), "int8")
    check_moments("lab-b", sent, WEIGHTS, OWN)
    check_moments("lab-b", {}, WEIGHTS, OWN)
    check_moments("lab-b", sent, WEIGHTS, {name: t for name, t in OWN.items() if "bias" in name})
    check_moments("lab-b", sent, WEIGHTS, {})
    with pytest.raises(PeerError, match=r"'odd\.0\.bias' is not one of this agent's"):
        check_moments("lab-b", encode_moments({"odd.0.bias": torch.zeros(40)}, "int8"), WEIGHTS, {})


def test_entries_of_unknown_kind_go_by_our_own() -> None:
    """Where no value of ours is negative, a peer's may not be either: a root may be taken of it."""
    own = {"nu.0.bias": torch.ones(40), "mu.0.bias": torch.linspace(-1, 1, 40)}
    low = {name: torch.linspace(-1, 1, 40) for name in own}
    check_moments("lab-b", encode_moments({**low, "nu.0.bias": torch.ones(40)}, "fp32"), WEIGHTS, own)
    with pytest.raises(PeerError, match=r"'nu\.0\.bias' holds values below 0"):
        check_moments("lab-b", encode_moments(low, "fp32"), WEIGHTS, own)
