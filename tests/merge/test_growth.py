"""Merges do not make weights grow without end. Reference: the bound itself, by norms computed one by one in double
precision, over many rounds in which a neighbour stays as close below it as it may."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dimat.config import MergeConfig
from dimat.errors import MergeError
from dimat.events import WARNING
from dimat.merge import MergeContext, MergeOutcome, Peer, merge, plan_merge
from dimat.merge.growth import HORIZON, Reference
from dimat.merge.natures import natures_of
from dimat.merge.pipeline import LARGE
from dimat.merge.registry import combine_registry
from dimat.merge.screen import norms_of
from dimat.symmetry import derive_symmetry

RATIO = 10.0
ROUNDS = 12


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def weights(seed: int) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network(seed).state_dict().items()}


def reference_of(own: Mapping[str, Tensor], model: nn.Module) -> Reference:
    natures = natures_of(own, model)
    return Reference.of(norms_of(own, natures), own, natures)


def norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


def scaled(own: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {name: tensor * factor if tensor.is_floating_point() else tensor for name, tensor in own.items()}


def context(own: Mapping[str, Tensor], model: nn.Module, reference: Reference | None, **more: Any) -> MergeContext:
    g = torch.Generator().manual_seed(3)
    data = [(torch.randn(32, 6, generator=g),)]

    def statistics(seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        drawn = {f"fisher.{n}": torch.rand(t.shape, generator=g) for n, t in own.items() if t.is_floating_point()}
        x, y = torch.randn(40, 6, generator=g), torch.randn(40, 16, generator=g)
        return {**drawn, "gram.0.weight": x.T @ x, "gram.3.weight": y.T @ y}

    return MergeContext(
        model,
        derive_symmetry(model, data[0]),
        data,
        score=lambda weights: -sum(norm(t) for t in weights.values()),
        base=weights(99),
        aux={"": statistics(0), "eve": statistics(1), "bob": statistics(2)},
        generator=torch.Generator().manual_seed(4),
        state={},
        reference=reference,
        **more,
    )


def plan_of(method: str) -> Any:
    return plan_merge(MergeConfig.model_validate({"align": "none", "combine": {"name": method}, "repair": "none"}))


@pytest.mark.parametrize("method", combine_registry.names())
def test_under_no_method_weights_grow_beyond_the_bound(method: str) -> None:
    """A neighbour sends 9.9 times what the agent has, every round: no tensor and not all of them together come to more
    than ten times what own training has made, and all stay finite."""
    model, own = network(0), weights(0)
    reference = reference_of(own, model)
    setting = context(own, model, reference)
    taken = 0
    for _ in range(ROUNDS):
        # under the screen's bound by own norm, and as large as the reference lets it be
        factor = min(9.9, 9.9 * reference.total / reference_of(own, model).total)
        peers = [Peer("eve", scaled(own, factor), 1 / 3), Peer("bob", own, 1 / 3)]
        try:
            outcome = merge(own, 1 / 3, peers, plan_of(method), setting)
        except MergeError as error:
            pytest.skip(f"{method} merges other models: {error}")
        own = outcome.weights
        taken += "eve" in outcome.mixing
        for name in reference.norms:
            assert norm(own[name]) <= RATIO * reference.usual(name) * (1 + 1e-6), name
        assert math.hypot(*(norm(own[name]) for name in reference.norms)) <= RATIO * reference.total * (1 + 1e-6)
    assert taken, "a neighbour that is refused from the first round shows nothing"


def test_without_the_bound_they_do() -> None:
    """The attack works where nothing is known of own training: the test above can fail."""
    model, own = network(0), weights(0)
    first, setting = reference_of(own, model).total, context(weights(0), model, None)
    for _ in range(ROUNDS):
        own = merge(own, 0.5, [Peer("eve", scaled(own, 9.9), 0.5)], plan_of("average"), setting).weights
    assert reference_of(own, model).total > 1e8 * first


def test_one_large_tensor_is_refused_too() -> None:
    """In all it would pass: the bound is by tensor, and a tensor that is still zero may grow to what is usual."""
    model, own = network(0), weights(0)
    setting = context(own, model, reference_of(own, model))
    eve = own | {"3.bias": own["3.bias"] * 60}
    outcome = merge(own, 0.5, [Peer("eve", eve, 0.5)], plan_of("average"), setting)
    assert "eve: tensor '3.bias' is" in outcome.refused["eve"]
    zero = own | {"3.bias": torch.zeros(4)}
    setting = context(zero, model, reference_of(zero, model))
    grown = zero | {"3.bias": torch.full((4,), 0.2)}
    outcome = merge(zero, 0.5, [Peer("bob", grown, 0.5)], plan_of("average"), setting)
    assert not outcome.refused
    assert outcome.accepted == 1
    assert torch.equal(outcome.weights["3.bias"], torch.full((4,), 0.1))


def test_a_method_that_overshoots_is_pulled_back_to_the_bound() -> None:
    """Task arithmetic with a coefficient of 200: the merge goes so far that its largest tensor meets its bound, a
    warning says so, and the ledger has the share that was taken."""
    model, own = network(0), weights(0)
    reference = reference_of(own, model)
    config = {"align": "none", "combine": {"name": "task-arithmetic", "options": {"scaling": 200.0}}, "repair": "none"}
    plan = plan_merge(MergeConfig.model_validate(config))
    outcome = merge(own, 0.5, [Peer("bob", weights(1), 0.5)], plan, context(own, model, reference))
    most = 0.5 + 0.5 * RATIO
    ratios = [norm(outcome.weights[n]) / (most * u) for n in reference.norms if (u := reference.usual(n))]
    ratios.append(math.hypot(*(norm(outcome.weights[n]) for n in reference.norms)) / (most * reference.total))
    assert max(ratios) == pytest.approx(1, rel=1e-5)
    assert 0 < outcome.accepted < 0.5
    assert any(note.startswith(WARNING) and "of the way" in note for note in outcome.notes)


def score_of(best: Mapping[str, Tensor]) -> Any:
    return lambda found: -math.hypot(*(norm(found[n] - t) for n, t in best.items() if t.is_floating_point()))


def judged(own: dict[str, Tensor], peers: list[Peer], best: Mapping[str, Tensor]) -> MergeOutcome:
    model = network(0)
    setting = context(own, model, reference_of(own, model), judge=score_of(best))
    return merge(own, 1 - sum(p.weight for p in peers), peers, plan_of("average"), setting)


def test_a_large_peer_is_left_out_where_it_makes_the_merge_worse() -> None:
    """Beyond `LARGE` a merge with it may not score worse than one without it, which else is made in its place."""
    own, bob = weights(0), weights(1)
    large = scaled(weights(2), 1.5 * LARGE)
    peers = [Peer("eve", large, 0.3), Peer("bob", bob, 0.3)]
    outcome = judged(own, peers, own)
    assert outcome.refused.keys() == {"eve"}
    assert "the merge without it" in outcome.refused["eve"]
    assert outcome.mixing == {"bob": 0.3}
    assert outcome.own_weight == pytest.approx(0.7)
    alone = judged(own, peers[1:], own)
    assert all(torch.equal(tensor, alone.weights[name]) for name, tensor in outcome.weights.items())
    # a network that is large for good reason: what it gives is better
    outcome = judged(own, peers, large)
    assert not outcome.refused
    torch.testing.assert_close(outcome.weights["0.weight"], sum_of(own, peers, "0.weight"))
    # one that is not unusual is not asked
    usual = [Peer("eve", scaled(own, 0.9 * LARGE), 0.3), peers[1]]
    assert not judged(own, usual, own).refused


def sum_of(own: Mapping[str, Tensor], peers: list[Peer], name: str) -> Tensor:
    rest = 1 - sum(peer.weight for peer in peers)
    return sum((peer.weight * peer.weights[name] for peer in peers), rest * own[name])


def test_the_reference_follows_own_training_alone() -> None:
    """By hand: up by what training adds, not by what a merge does; at most twice in a round; down slowly."""
    own = {"w": torch.full((4,), 0.5), "zero": torch.zeros(4)}
    reference = Reference.of({"w": 1.0, "zero": 0.0}, own, natures_of(own))
    assert reference.usual("zero") == pytest.approx(math.sqrt(1 / 8) * 2)
    # a merge made 5 of 1, training adds a quarter
    assert reference.after_training({"w": 5.0, "zero": 0.0}, {"w": 5.25, "zero": 0.0}) == {"w": 1.25, "zero": 0.0}
    # a merge made less of it, and training what it was: nothing is left over from that
    assert reference.after_training({"w": 0.5, "zero": 0.0}, {"w": 1.1, "zero": 0.0})["w"] == pytest.approx(1.1)
    # training that runs away
    assert reference.after_training({"w": 5.0, "zero": 0.0}, {"w": 1e9, "zero": 0.0})["w"] == 2.0
    # what was zero begins to grow, at first to what is usual
    assert reference.after_training({"w": 1.0, "zero": 0.0}, {"w": 1.0, "zero": 0.3})["zero"] == pytest.approx(0.3)
    assert reference.after_training({"w": 0.2, "zero": 0.0}, {"w": 0.2, "zero": 0.0})["w"] == 1 - 0.8 / HORIZON


@given(
    st.lists(st.floats(-3, 3), min_size=3, max_size=3),
    st.lists(st.floats(-3, 3), min_size=3, max_size=3),
    st.floats(0.1, 5),
)
def test_the_share_is_the_largest_within_the_bound(own: list[float], merged: list[float], bound: float) -> None:
    """By definition, at points on the segment; own norms beyond the bound may stay and not grow."""
    ours, made = {"w": torch.tensor(own).double()}, {"w": torch.tensor(merged).double()}
    reference = Reference({"w": bound}, {"w": 3}, {"w": 0.0})
    share, _ = reference.share(ours, made, 1.0)
    most = max(bound, norm(ours["w"]))
    assert norm(torch.lerp(ours["w"], made["w"], share)) <= most * (1 + 1e-6)
    if share < 1:
        further = min(share + 1e-3, 1.0)
        assert norm(torch.lerp(ours["w"], made["w"], further)) > most * (1 - 1e-6)


def test_bit_equal_where_the_bound_is_not_met() -> None:
    """Honest weights are untouched by it: the same bits with a reference and without one."""
    own = weights(0)
    model = network(0)
    peers = [Peer("bob", weights(1), 0.4), Peer("eve", weights(2), 0.2)]
    for preset in ("average", "dimat"):
        plan = plan_merge(MergeConfig(method=preset))
        with_, without = (
            merge(own, 0.4, peers, plan, copy.copy(context(own, model, found)))
            for found in (reference_of(own, model), None)
        )
        assert with_.notes == without.notes
        assert all(torch.equal(t, without.weights[n]) for n, t in with_.weights.items())
