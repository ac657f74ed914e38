"""Acceptance: always, and the back-off along the segment."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from dimat.errors import MergeError
from dimat.merge.accept.always import always
from dimat.merge.accept.no_worse import no_worse

OWN = {"w": torch.zeros(1), "n": torch.tensor(1)}
MERGED = {"w": torch.ones(1), "n": torch.tensor(2)}


def score_up_to(limit: float, seen: list[float]) -> Callable[[Mapping[str, Tensor]], float]:
    def score(weights: Mapping[str, Tensor]) -> float:
        seen.append(float(weights["w"]))
        return 1.0 if seen[-1] <= limit else 0.0

    return score


@pytest.mark.parametrize(("limit", "share"), [(1.0, 1.0), (0.6, 0.5), (0.3, 0.25), (0.1, 0.0)])
def test_backs_off_to_the_first_point_that_serves(limit: float, share: float) -> None:
    """Reference: a score that falls beyond a known point of the segment."""
    seen: list[float] = []
    accepted = no_worse(OWN, MERGED, score=score_up_to(limit, seen))
    assert accepted.share == share
    assert float(accepted.weights["w"]) == share
    assert seen[1:] == [s for s in (1.0, 0.5, 0.25) if s >= share]
    assert bool(accepted.notes) == (share < 1)


def test_a_fall_within_the_tolerance_is_kept() -> None:
    """0.02 by default."""
    for fall, share in ((0.019, 1.0), (0.021, 0.0)):
        accepted = no_worse(OWN, MERGED, score=lambda w, fall=fall: 0.9 - fall * (float(w["w"]) > 0))
        assert accepted.share == share


def test_points_inside_the_segment_are_repaired() -> None:
    """The merged weights come repaired already; ½ does not."""
    repaired: list[float] = []

    def repair(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        repaired.append(float(weights["w"]))
        return weights

    no_worse(OWN, MERGED, score=lambda w: -float(w["w"] > 0.7), repair=repair)
    assert repaired == [0.5]


def test_nan_scores_are_the_worst() -> None:
    """A merge that scores NaN is not kept; own weights that do are left behind."""
    assert no_worse(OWN, MERGED, score=lambda w: float("nan") if w["w"] else 0.5).share == 0.0
    assert no_worse(OWN, MERGED, score=lambda w: 0.1 if w["w"] else float("nan")).share == 1.0


def test_points_between_lora_factors_are_between_their_products() -> None:
    """Reference: a dense SVD of the mean of both products (Eckart and Young); merged factors in any basis of their own
    give the same point, and what is no factor is interpolated."""
    generator = torch.Generator().manual_seed(0)
    a, b, other_a, other_b, turn = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in [(3, 7), (9, 3), (3, 7), (9, 3), (3, 3)]
    )
    mean = (b @ a + other_b @ other_a) / 2
    u, s, v = torch.linalg.svd(mean)
    expected = (u[:, :3] * s[:3]) @ v[:3]
    own = {"q.lora_A.weight": a, "q.lora_B.weight": b, "head": torch.zeros(1)}
    for basis in (torch.eye(3, dtype=torch.float64), turn):
        merged = {
            "q.lora_A.weight": torch.linalg.solve(basis, other_a),
            "q.lora_B.weight": other_b @ basis,
            "head": torch.ones(1),
        }
        found = no_worse(own, merged, score=lambda w: -float(w["head"] > 0.7)).weights
        assert float(found["head"]) == 0.5
        torch.testing.assert_close(found["q.lora_B.weight"] @ found["q.lora_A.weight"], expected)


def test_integers_stay_own_inside_the_segment() -> None:
    """They cannot be interpolated."""
    assert int(no_worse(OWN, MERGED, score=score_up_to(0.6, [])).weights["n"]) == 1


def test_no_score_is_an_error_and_always_needs_none() -> None:
    """A rule that compares needs something to compare."""
    with pytest.raises(MergeError, match="needs a score"):
        no_worse(OWN, MERGED, score=None)
    assert always(OWN, MERGED).weights == MERGED
