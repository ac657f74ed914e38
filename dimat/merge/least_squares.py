"""Normal equations of least squares, where some directions may have been seen little or never."""

from __future__ import annotations

import torch
from torch import Tensor

SINGULAR = 1e-6
"""Inputs that hold less than this of their own, apart from what others tell of them, count as dependent."""


def solve_semidefinite(matrix: Tensor, right: Tensor, ridge: float = 0.0) -> Tensor:
    """Return the smallest X, in units of the matrix's diagonal, with (matrix + ridge · its diagonal) · X = right.

    The matrix is symmetric and positive semidefinite; rows of zeros in it give rows of zeros.
    """
    scale = matrix.diagonal().clamp_min(0).rsqrt()
    scale = torch.where(scale.isfinite(), scale, 0.0)[:, None]
    scaled, right = scale * matrix * scale.mT, scale * right
    dead = (scale[:, 0] == 0).to(matrix.dtype)
    scaled.diagonal().add_((1 - dead) * ridge)
    factor, fault = torch.linalg.cholesky_ex(scaled + dead.diag())
    if not fault and float(factor.diagonal().min()) > SINGULAR:
        return scale * torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(scaled)
    inverse = torch.where(values > SINGULAR**2 * values[-1], 1 / values, 0.0)
    return scale * (vectors @ (inverse[:, None] * (vectors.mT @ right)))
