"""Linear layers and convolutions as matrices over rows of inputs; least squares."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SINGULAR = 1e-6
"""Inputs count as linearly dependent if the share of them that other inputs do not predict is below this."""

Affine = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
"""Layers that apply a matrix to each row of their inputs (for convolutions: the patch below each output position)."""


def blocks_of(layer: Affine) -> int:
    """Return the number of blocks in the layer's matrix: a convolution's groups."""
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def as_blocks(weight: Tensor, blocks: int) -> Tensor:
    """Return a weight, (out, in, …), as matrices (blocks, out / blocks, in · …)."""
    return weight.reshape(blocks, weight.shape[0] // blocks, prod(weight.shape[1:]))


def input_rows(layer: Affine, inputs: Tensor, keep: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the rows to which the layer's matrix is applied: (blocks, rows, in · kernel), a copy.

    output = rows · matrixᵀ + bias, for every row: example by example, then position by position. `keep` receives the
    indices of all rows, (rows, 1), and returns those to take. Strides, dilations, groups and every kind of padding are
    the layer's; a convolution's input may lack its batch dimension.
    """
    if isinstance(layer, nn.Linear):
        rows = inputs.reshape(-1, inputs.shape[-1])
        return rows[keep(_numbers(rows.shape[0], inputs.device))[:, 0]][None]
    spatial = len(layer.kernel_size)
    x = inputs if inputs.ndim == spatial + 2 else inputs[None]
    x = F.pad(x, _padding(layer), "constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    for dim, (size, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation), 2):
        x = x.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]  # a view: only what is kept is copied
    places = (x.shape[0], *x.shape[2 : 2 + spatial])
    kept = keep(_numbers(prod(places), inputs.device))[:, 0]
    at = torch.unravel_index(kept, places)
    patches = x.movedim(1, 1 + spatial)[at]  # (rows, in, kernel …)
    return patches.reshape(len(kept), layer.groups, -1).transpose(0, 1)


def _numbers(rows: int, device: torch.device) -> Tensor:
    return torch.arange(rows, device=device)[:, None]


def _padding(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """Return the padding in the order of `F.pad`, last dimension first."""
    pairs: list[tuple[int, int]] = []
    for i, (size, dilation) in enumerate(zip(layer.kernel_size, layer.dilation)):
        if layer.padding == "same":
            total = dilation * (size - 1)
            pairs.append((total // 2, total - total // 2))
        elif isinstance(layer.padding, str):
            pairs.append((0, 0))
        else:
            pairs.append((layer.padding[i], layer.padding[i]))
    return [side for pair in reversed(pairs) for side in pair]


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
