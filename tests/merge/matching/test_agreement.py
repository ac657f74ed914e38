"""Agreement in function of merged networks. References: the formula by hand, and laws that it must obey."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dimat.merge.matching.agreement import agreements, half_way


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(seed: int, outputs: int = 3) -> dict[str, Tensor]:
    draw = generator(seed)
    return {"weight": torch.randn(outputs, 4, generator=draw), "bias": torch.randn(outputs, generator=draw)}


X = torch.randn(70, 4, generator=generator(0))


def given(weights: dict[str, Tensor]) -> Tensor:
    return (X @ weights["weight"].T + weights["bias"]).double()


def test_is_the_formula_by_hand_over_pieces_of_data() -> None:
    """Reference: 1 − Σ (m − t)² / Σ t², rows centred, over all examples at once; here they come in uneven batches."""
    own, peer, merged = linear(1), linear(2), linear(3)
    found = agreements(own, peer, [merged], model=nn.Linear(4, 3), data=[(X[:50],), (X[50:],)])
    t, m = (given(own) + given(peer)) / 2, given(merged)
    t, m = (x - x.mean(1, keepdim=True) for x in (t, m))
    assert found[0] == pytest.approx(1 - float((m - t).square().sum() / t.square().sum()), rel=1e-5)


def test_one_column_is_centred_over_examples() -> None:
    """Reference: the same formula, columns centred: a single output has nothing else to be compared with."""
    own, peer, merged = linear(1, 1), linear(2, 1), linear(3, 1)
    found = agreements(own, peer, [merged], model=nn.Linear(4, 1), data=[(X,)])
    t, m = (given(own) + given(peer)) / 2, given(merged)
    t, m = (x - x.mean(0) for x in (t, m))
    assert found[0] == pytest.approx(1 - float((m - t).square().sum() / t.square().sum()), rel=1e-5)


def test_linear_networks_agree_with_their_mean_and_a_shift_of_all_outputs_changes_nothing() -> None:
    """Reference: f is linear in the weights, so the mean of weights gives the mean of outputs."""
    own, peer = linear(1), linear(2)
    mean = half_way(own, peer)
    shifted = {"weight": mean["weight"], "bias": mean["bias"] + 5}
    alike = {"weight": torch.zeros(3, 4), "bias": torch.ones(3)}
    broken = {"weight": torch.full((3, 4), torch.inf), "bias": torch.ones(3)}
    found = agreements(own, peer, [mean, shifted, alike, broken], model=nn.Linear(4, 3), data=[(X,)])
    assert found == [pytest.approx(1, abs=1e-6), pytest.approx(1, abs=1e-6), pytest.approx(0, abs=1e-6), -torch.inf]


def test_reads_no_more_examples_than_it_may() -> None:
    """Reference: the first examples alone; later ones are not finite and would spoil the figures."""
    rest = torch.full((30, 4), torch.nan)
    few = agreements(linear(1), linear(2), [linear(3)], model=nn.Linear(4, 3), data=[(X[:40],)])
    more = agreements(
        linear(1), linear(2), [linear(3)], model=nn.Linear(4, 3), data=[(torch.cat([X[:40], rest]),)], max_images=40
    )
    assert few == more


class Two(nn.Module):
    """Two outputs and a number: the first two count, unless one is chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": self.one(x), "b": self.other(x), "kind": x.argmax(-1), "loss": x.mean()}


def test_takes_the_mean_over_outputs_or_those_that_are_chosen() -> None:
    """Reference: one output equal, the other one reversed in sign: 1 and 1 − 4 = −3."""
    model = Two()
    own = {k: v.detach().clone() for k, v in model.state_dict().items()}
    merged = {k: -v if k.startswith("other") else v for k, v in own.items()}
    for outputs, expected in (((), -1.0), ((0,), 1.0), ((1,), -3.0)):
        found = agreements(own, own, [merged], model=model, data=[(X,)], outputs=outputs)
        assert found == [pytest.approx(expected, abs=1e-5)], outputs
