"""Deltas of weight matrices taken as matrices, for spectral methods.

A tensor of two or more dimensions is a matrix (out, in · kernel). Vectors, matrices of one row or column, and
kernels that see one input channel (depthwise convolutions) have no spectrum to speak of: they are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import Pieces, accumulator
from dimat.merge.tensors.streaming import MergedWeights, base_tensor, needs_base, taking_part
from dimat.merge.tensors.task_vectors import weighted_sum

MergeMatrices = Callable[[list[Tensor]], Tensor]
"""Deltas, each scaled by n w_k (of n models, so that equal weights scale by 1) → merged delta; all (rows, columns)."""


def merge_matrices(
    own: Weights,
    peers: Sequence[Weights],
    weights: Sequence[float],
    base: Weights | None,
    method: str,
    scaling: float,
    merge: MergeMatrices,
) -> Weights:
    """Return θ = θ_base + α · merge(n w_k τ_k) for matrices and θ_base + α Σ_k w_k τ_k for all else, α = `scaling`.

    Models of weight 0 take no part. Where all deltas are equal there is nothing to merge: θ = θ_base + α τ, which
    is the tensor as it is for α = 1; and so it is in any case where one model is alone. Raises MergeError where
    the base is missing or does not fit.
    """
    base = needs_base(base, method)
    peers, weights = taking_part(peers, weights)
    first = 0 if weights[0] else 1
    mass = weights[first:]

    def merge_tensor(name: str, start: Tensor, others: list[Tensor]) -> Tensor:
        models = [start, *others][first:]
        origin, dtype = base_tensor(name, start, base), accumulator(start)
        alone = models[0].to(start.device, dtype)
        if all(torch.equal(model.to(start.device, dtype), alone) for model in models[1:]):
            same = scaling == 1 or len(models) == 1
            return (alone.clone() if same else origin.to(dtype) + scaling * (alone - origin)).to(start.dtype)
        del alone
        shape = _matrix_shape(start)
        if shape is None:
            return Pieces(models, start, origin).merged(lambda deltas: weighted_sum(deltas, mass), scaling)
        before = origin.to(dtype)  # torch adds no 8-bit floats
        deltas = [model.to(start.device, dtype, copy=True).sub_(before) for model in models]
        merged = merge([delta.mul_(weight * len(mass)).reshape(shape) for delta, weight in zip(deltas, mass)])
        return (before + scaling * merged.reshape(start.shape)).to(start.dtype)

    return MergedWeights(own, peers, merge_tensor)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin U, σ (falling) and Vᵀ of a matrix, with zeros in place of vectors whose σ is only rounding.

    Those vectors would be arbitrary, and others would be turned away from them.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    known = (values > values[0] * _rounding(matrix)).to(matrix.dtype)
    return left * known, values, right * known[:, None]


def orthogonal_factor(matrix: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal rows or columns, U Vᵀ of the SVD U Σ Vᵀ, on the matrix's range.

    Flipping or reordering columns flips or reorders the result's; zero columns stay zero.
    """
    left, _, right = svd(matrix)
    return left @ right


def _matrix_shape(tensor: Tensor) -> tuple[int, int] | None:
    if tensor.ndim < 2 or not tensor.numel() or (tensor.ndim > 2 and tensor.shape[1] == 1):
        return None
    rows, columns = tensor.shape[0], tensor[0].numel()
    return (rows, columns) if rows > 1 and columns > 1 else None


def _rounding(matrix: Tensor) -> float:
    return max(matrix.shape) * torch.finfo(matrix.dtype).eps
