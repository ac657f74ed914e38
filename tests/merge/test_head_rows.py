"""Rows of a head averaged by who has the class. References: the average, and sums by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dimat import merge_weights
from dimat.errors import ConfigError, MergeError
from dimat.merge.combine.average import average
from dimat.merge.head_rows import rows_by_class
from tests.merge.methods import assert_same_bits


def model(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"body.weight": (5, 3), "fc.weight": (4, 5), "fc.bias": (4,)}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def counts(*of: int) -> dict[str, Tensor]:
    return {"class_count.fc.weight": torch.tensor(of)}


@settings(max_examples=25, deadline=None)
@given(
    told=st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=2, max_size=4),
    raw=st.lists(st.floats(0.05, 1), min_size=4, max_size=4),
)
def test_a_row_is_the_mean_over_those_who_have_its_class(told: list[list[int]], raw: list[float]) -> None:
    """By hand, in float64; a row of a class that nobody has, and all other tensors, are as combined, bit for bit."""
    models, weights = [model(k) for k in range(len(told))], [w / sum(raw[: len(told)]) for w in raw[: len(told)]]
    mean = average(models[0], models[1:], weights)
    found = rows_by_class(mean, models, weights, [counts(*each) for each in told])
    assert_same_bits({"body.weight": found["body.weight"]}, {"body.weight": mean["body.weight"]})
    for name in ("fc.weight", "fc.bias"):
        for c in range(4):
            factors = [w * each[c] for w, each in zip(weights, told)]
            if not sum(factors):
                assert torch.equal(found[name][c], mean[name][c])
                continue
            by_hand = sum(f * m[name][c].double() for f, m in zip(factors, models)) / sum(factors)
            torch.testing.assert_close(found[name][c].double(), torch.as_tensor(by_hand), rtol=0, atol=1e-6)


def test_equal_counts_give_the_average() -> None:
    """Where all have as many examples of each class, mixing weights decide."""
    models = [model(k) for k in range(3)]
    mean = average(models[0], models[1:], [0.5, 0.3, 0.2])
    found = rows_by_class(mean, models, [0.5, 0.3, 0.2], [counts(3, 1, 2, 7)] * 3)
    for name, tensor in mean.items():
        torch.testing.assert_close(found[name], tensor)


def test_a_class_that_one_alone_has_is_taken_from_it() -> None:
    """Through `merge_weights`; own's row comes back bit for bit, and a peer's is its own to rounding."""
    own, peer = model(0), model(1)
    merged = merge_weights(
        own, [peer], [0.9, 0.1], "average", head="rows", aux=[counts(4, 0, 1, 0), counts(0, 7, 1, 0)]
    )
    assert torch.equal(merged["fc.weight"][0], own["fc.weight"][0])
    torch.testing.assert_close(merged["fc.weight"][1], peer["fc.weight"][1])
    mean = merge_weights(own, [peer], [0.9, 0.1], "average")
    torch.testing.assert_close(merged["fc.bias"][2:], mean["fc.bias"][2:])
    assert torch.equal(merged["body.weight"], mean["body.weight"])


def test_missing_counts_and_unknown_ways_are_told() -> None:
    """Bad input: one line each."""
    own, peer = model(0), model(1)
    with pytest.raises(MergeError, match=r'head = "rows" needs every model\'s counts of classes'):
        merge_weights(own, [peer], [0.5, 0.5], "average", head="rows")
    with pytest.raises(MergeError, match=r'head = "rows" needs every model\'s counts of classes'):
        rows_by_class(own, [own, peer], [0.5, 0.5], [counts(1, 1, 1, 1), {}])
    with pytest.raises(ConfigError, match=r"head"):
        merge_weights(own, [peer], [0.5, 0.5], "average", head="row")
