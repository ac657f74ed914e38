"""Assignments against brute force."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat.merge.matching.assignment import assign, assignment_value, margin, moved_share


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), units=st.integers(1, 6))
def test_assignment_is_the_best_of_all_permutations(seed: int, units: int) -> None:
    """Reference: all units! permutations."""
    scores = torch.randn(units, units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p = assign(scores)
    assert sorted(p.tolist()) == list(range(units))
    best = max(sum(float(scores[j, i]) for j, i in enumerate(q)) for q in permutations(range(units)))
    assert assignment_value(scores, p) == pytest.approx(best, abs=1e-12)


def test_tied_rows_give_a_permutation() -> None:
    """Constant units have zero rows: any permutation of them is as good, but it must be one."""
    assert sorted(assign(torch.zeros(5, 5)).tolist()) == [0, 1, 2, 3, 4]


def test_margin_by_hand() -> None:
    """Row 0: 0.9 − 0.5; row 1: 0.2 − 0.6; mean 0. One unit: 0."""
    scores = torch.tensor([[0.9, 0.5], [0.6, 0.2]])
    assert margin(scores, torch.tensor([0, 1])) == pytest.approx(0.0, abs=1e-7)
    assert margin(torch.ones(1, 1), torch.tensor([0])) == 0.0


def test_moved_share_by_hand() -> None:
    """Two of six units change place."""
    assert moved_share({"a": torch.tensor([0, 1, 2]), "b": torch.tensor([1, 0, 2])}) == pytest.approx(1 / 3)
    assert moved_share({}) == 0.0
