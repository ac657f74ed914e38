"""Streaming statistics against numpy on the whole data at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dimat.merge.matching.activation_statistics import CrossStatistics, PositionSampler, average_correlation


def reference(x: Tensor, y: Tensor) -> Tensor:
    """numpy.corrcoef's own × peer block."""
    block = np.corrcoef(x.double().numpy().T, y.double().numpy().T)
    return torch.from_numpy(block[: x.shape[1], x.shape[1] :])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    samples=st.integers(2, 80),
    units=st.integers(1, 7),
    batch=st.integers(1, 33),
    offset=st.sampled_from([0.0, 5.0, 1e3]),
)
def test_correlation_equals_numpy_corrcoef(seed: int, samples: int, units: int, batch: int, offset: float) -> None:
    """Reference: numpy.corrcoef in float64 on all samples, for any split into batches and any mean."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(units, units, generator=g)
    x = torch.randn(samples, units, generator=g)
    y = x @ mix + torch.randn(samples, units, generator=g)
    x, y = x + offset, y - offset
    statistics = CrossStatistics(1)
    for start in range(0, samples, batch):
        statistics.update(x[start : start + batch], [y[start : start + batch]])
    torch.testing.assert_close(statistics.correlation(0), reference(x, y), rtol=0, atol=2e-5)


def test_float64_activations_are_exact() -> None:
    """Reference: numpy.corrcoef; float64 activations are multiplied in float64."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 500, 9, generator=g, dtype=torch.float64).unbind()
    statistics = CrossStatistics(1)
    for part in range(0, 500, 100):
        statistics.update(x[part : part + 100], [y[part : part + 100]])
    torch.testing.assert_close(statistics.correlation(0), reference(x, y), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_accumulate_in_full_precision(dtype: torch.dtype) -> None:
    """Reference: numpy.corrcoef of the rounded values; 50,000 samples would overflow or stall half sums."""
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(50_000, 3, generator=g) + 30).to(dtype)
    statistics = CrossStatistics(1)
    statistics.update(x, [x])
    torch.testing.assert_close(statistics.correlation(0), reference(x, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("constant", [0.0, 1.0, -3e4, 0.1])
def test_constant_units_have_zero_rows(constant: float) -> None:
    """A unit without variance correlates with nothing: zero, never NaN (a fault of the published program)."""
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(1))
    x[:, 2] = constant
    statistics = CrossStatistics(1)
    statistics.update(x[:150], [x[:150]])
    statistics.update(x[150:], [x[150:]])
    correlation = statistics.correlation(0)
    assert torch.isfinite(correlation).all()
    assert not correlation[2].any()
    assert not correlation[:, 2].any()
    torch.testing.assert_close(correlation.diagonal()[[0, 1, 3]], torch.ones(3, dtype=torch.float64))


def test_a_unit_constant_in_the_first_batch_only() -> None:
    """The shift by the first batch's mean must not make later variance vanish."""
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(1))
    x[:50, 1] = 0
    statistics = CrossStatistics(1)
    statistics.update(x[:50], [x[:50]])
    statistics.update(x[50:], [x[50:]])
    torch.testing.assert_close(statistics.correlation(0), reference(x, x), rtol=0, atol=1e-6)


def test_non_finite_activations_become_zero() -> None:
    """Weights can be finite and activations overflow; the assignment then goes on with what is left."""
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    y = x.clone()
    y[7, 1] = torch.inf
    statistics = CrossStatistics(1)
    statistics.update(x, [y])
    assert torch.isfinite(statistics.correlation(0)).all()


def test_several_peers_share_own_statistics_and_points_are_averaged() -> None:
    """Reference: numpy.corrcoef per peer and point, then the plain mean over points."""
    g = torch.Generator().manual_seed(2)
    own, first, second = torch.randn(3, 2, 60, 4, generator=g).unbind()
    points = [CrossStatistics(2), CrossStatistics(2)]
    for i, point in enumerate(points):
        point.update(own[i], [first[i], second[i]])
    for k, peer in enumerate((first, second)):
        expected = (reference(own[0], peer[0]) + reference(own[1], peer[1])) / 2
        torch.testing.assert_close(average_correlation(points, k), expected, rtol=0, atol=1e-6)


def test_position_sampler_takes_the_same_positions_of_every_image_and_model() -> None:
    """Samples carry (image, position) numbers: each image keeps the same positions, each model the same."""
    images, positions = 5, 20
    ids = torch.arange(images * positions).unsqueeze(1)
    sampler = PositionSampler(6, torch.Generator().manual_seed(0))
    kept = sampler(ids, images).flatten().reshape(images, 6)
    assert torch.equal(kept % positions, (kept % positions)[:1].expand(images, 6))
    assert torch.equal(kept // positions, torch.arange(images).unsqueeze(1).expand(images, 6))
    assert torch.equal(sampler(ids, images).flatten(), kept.flatten())
    sampler.next_batch()
    assert not torch.equal(sampler(ids, images).flatten(), kept.flatten())


@pytest.mark.parametrize(("limit", "rows"), [(None, 40), (10, 40), (8, 40)])
def test_position_sampler_keeps_all_where_there_are_few(limit: int | None, rows: int) -> None:
    """8 positions an image are within the limit; None keeps all."""
    samples = torch.zeros(rows, 2)
    assert PositionSampler(limit, torch.Generator().manual_seed(0))(samples, 5) is samples
