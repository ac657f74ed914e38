"""Streaming statistics of activations: how strongly own units correlate with a peer's.

Only own × peer blocks and variances are kept, n(U² + 2U) numbers for n peers and U units, never the full
((n+1)U)² covariance. A batch is multiplied in float32 (or in float64 if it is that) after subtracting the first
batch's means, so that nothing cancels; sums over batches are float64, on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1024
"""Samples that are summed up in float32: a skinny product over 65,536 of them was off by 2e-4."""

NEGLIGIBLE = 1e-6
"""A unit whose standard deviation is below this share of its mean is constant as far as float32 can tell."""


@dataclass
class _Moments:
    """ΣX and ΣX² of one model's units at one point, shifted by the first batch's mean. Tensors: (units,) float64."""

    shift: Tensor
    total: Tensor
    squares: Tensor

    @staticmethod
    def like(first: Tensor) -> _Moments:
        zero = torch.zeros(first.shape[1], dtype=torch.float64)
        return _Moments(first.mean(0), zero, zero.clone())

    def add(self, samples: Tensor) -> Tensor:
        """Add a batch (samples, units) and return it shifted."""
        centred = samples - self.shift
        self.total += centred.sum(0).cpu().double()
        self.squares += centred.square().sum(0).cpu().double()
        return centred

    def deviation(self, count: int) -> Tensor:
        """Standard deviation (population) of each unit; exactly zero for units that are constant."""
        mean = self.total / count
        variance = (self.squares / count - mean.square()).clamp_min_(0)
        scale = self.shift.cpu().double() + mean
        return variance.sqrt() * (variance > (NEGLIGIBLE * scale).square())


class CrossStatistics:
    """Streams ΣX, ΣY, ΣX², ΣY² and ΣXYᵀ of own units X and each peer's units Y at one observation point."""

    def __init__(self, peers: int) -> None:
        self.count = 0
        self._peers = peers
        self._own: _Moments | None = None
        self._others: list[_Moments] = []
        self._products: list[Tensor] = []

    def update(self, own: Tensor, peers: Sequence[Tensor]) -> None:
        """Add a batch: own (samples, units) and each peer's (samples, units) on the same samples, in order."""
        own = _full(own)
        others = [_full(peer) for peer in peers]
        if self._own is None:
            self._own = _Moments.like(own)
            self._others = [_Moments.like(other) for other in others]
            self._products = [torch.zeros(own.shape[1], o.shape[1], dtype=torch.float64) for o in others]
        self.count += own.shape[0]
        left = self._own.add(own)
        for moments, product, other in zip(self._others, self._products, others):
            product += _product(left, moments.add(other))

    def correlation(self, peer: int) -> Tensor:
        """Pearson correlation of own units (rows) with a peer's units (columns): (units, units), float64.

        corr = (E[x yᵀ] − μ_x μ_yᵀ) / (σ_x σ_yᵀ). Rows and columns of constant units are zero, and so is
        whatever is not finite: the result never holds a NaN.
        """
        if self._own is None:
            raise ValueError("correlation of no samples")
        x, y, n = self._own, self._others[peer], self.count
        # in place: of wide layers these are large, and it is done for each point, peer and look
        covariance = (self._products[peer] / n).sub_(torch.outer(x.total / n, y.total / n))
        scale = torch.outer(x.deviation(n), y.deviation(n))
        correlation, told = covariance.div_(scale), scale > 0
        if not bool(told.all()):
            correlation.masked_fill_(told.logical_not_(), 0.0)
        return correlation.nan_to_num_(0.0, 0.0, 0.0)


def average_correlation(points: Sequence[CrossStatistics], peer: int) -> Tensor:
    """Mean over a group's observation points of own × peer correlations: (units, units), float64."""
    if len(points) > 2:
        return torch.stack([point.correlation(peer) for point in points]).mean(0)
    first, *second = (point.correlation(peer) for point in points)
    return first.add_(second[0]).div_(2) if second else first


class PositionSampler:
    """Keeps at most `positions` of the positions of each image, drawn for each batch, the same for all models.

    Samples come as (images · positions, units), image by image. Neighbouring positions carry much the same information,
    so 64 of them are nearly as good as 1,024, at a sixteenth of the cost. None keeps all.
    """

    def __init__(self, positions: int | None, generator: torch.Generator) -> None:
        self._positions = positions
        self._generator = generator
        self._drawn: dict[int, Tensor] = {}

    def next_batch(self) -> None:
        """Forget the positions drawn so far."""
        self._drawn.clear()

    def __call__(self, samples: Tensor, images: int) -> Tensor:
        """Return the kept rows of `samples`."""
        per_image, rest = divmod(samples.shape[0], images)
        if self._positions is None or rest or per_image <= self._positions:
            return samples
        if per_image not in self._drawn:
            chosen = torch.randperm(per_image, generator=self._generator, device=self._generator.device)
            self._drawn[per_image] = chosen[: self._positions].sort().values.to(samples.device)
        kept = samples.unflatten(0, (images, per_image)).index_select(1, self._drawn[per_image])
        return kept.flatten(0, 1)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Return xᵀ y: (units, units), float64, on the CPU."""
    whole = x.shape[0] // BLOCK * BLOCK
    rest = (x[whole:].T @ y[whole:]).cpu().double()
    if not whole:
        return rest
    blocks = torch.bmm(x[:whole].unflatten(0, (-1, BLOCK)).mT, y[:whole].unflatten(0, (-1, BLOCK)))
    return rest + blocks.cpu().double().sum(0)


def _full(samples: Tensor) -> Tensor:
    return samples if samples.dtype == torch.float64 else samples.float()
