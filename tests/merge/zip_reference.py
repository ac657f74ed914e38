"""ZipIt's matching as its authors' program gives it: matrices made of a covariance, by `zip_units`."""

from __future__ import annotations

import torch
from torch import Tensor

from dimat.merge.matching.zip_units import zip_units

NEGLIGIBLE = 1e-7
"""Products of standard deviations below this count as this: units that hardly move go with nothing."""


def correlation_of(covariance: Tensor) -> Tensor:
    """Return cov[i, j] / max(σ_i σ_j, 1e-7): the correlation that ZipIt matches by, in the covariance's own type."""
    deviation = covariance.diagonal().sqrt()
    return covariance / torch.outer(deviation, deviation).clamp_min(NEGLIGIBLE)


def zip_matrices(covariance: Tensor, models: int, a: float, b: float) -> tuple[Tensor, Tensor]:
    """Return ZipIt's merge matrix (units, models · units) and unmerge matrix (models · units, units).

    unmerge[i, c] is 1 where unit i becomes merged unit c, else 0. merge is its transpose with row c scaled to sum 1:
    a row is a mean. The authors divide by count + 1e-5 instead, which shrinks weights at every merge.
    """
    labels = zip_units(correlation_of(covariance), models, a, b)
    units = covariance.shape[0] // models
    unmerge = torch.nn.functional.one_hot(labels, units).to(covariance)
    return (unmerge / unmerge.sum(0)).mT, unmerge
