"""OPCM's projection: a new delta's part outside the merged one's leading directions.

For matrices T (new) and M (merged), both m × n, M = Σ_i σ_i u_i v_iᵀ with σ falling, and k the split rank,

    A = Uᵀ T V,   A[:k, :k] = 0,   and with `diagonal` also A_ii = 0 for all i,   C = U A Vᵀ.

It is never computed in that form, for U and V of a full SVD are large and mostly multiplied by what stays. With the
first k vectors U_k, V_k alone, B = U_kᵀ T V_k and d_i = u_iᵀ T v_i, the same C is

    C = T − U_k B V_kᵀ                                        (`diagonal` False)
    C = T − U diag(d) Vᵀ − U_k (B − diag B) V_kᵀ              (`diagonal` True; U, V of all σ_i above the cutoff).

The first form asks for a subspace, which the Gram matrix of the smaller side gives in float64: all σ, then k vectors
V_k, and U_k = M V_k Σ_k⁻¹ made orthonormal again. Where σ_k < 1e-3 σ_1, squaring would lose too much and a thin SVD
takes over, as it does for the second form, which needs every single vector: through the Gram matrix those of small σ_i
are wrong in the third digit. Below the cutoff σ_i ≤ max(m, n) ε σ_1 vectors are arbitrary and are left alone.

All functions take real or complex matrices on any device, (b, m, n) for batches. σ and the vectors are computed in
double precision; products are in the type of T, so that float32 deltas halve their cost and cost seven digits.
C depends on the direction of M and not on its length.

Paper: Tang et al., "Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model
Merging", 2025, arXiv 2501.09522.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from dimat.errors import ConfigError, MergeError
from dimat.merge.stages import Weights

Count = Annotated[int, Field(ge=1)]

Split = Count | tuple[Count, Annotated[int, Field(ge=0)]]
"""Into how many equal parts, along dim 0 or the dim named second."""

SMALL = 48
"""Gram matrices up to this size go to a general eigensolver; what can be saved there is less than a call costs."""

SUBSET = 0.28
"""Share of the eigenvectors up to which inverse iteration, which takes them one by one and clears each of those before
it, is faster than finding all of the tridiagonal's."""

SQUARED = 1e-3
"""Least σ_k / σ_1 for which vectors come from the Gram matrix, which knows them to ε (σ_1 / σ_k)²."""

EASY = 1 / 16
"""σ_k / σ_1 from which M V Σ⁻¹ is orthonormal as it comes, and float32 is enough for it where T is float32."""

TOGETHER = 1 << 25
"""Most elements of tensors of equal shape that a GPU takes at once."""

RUNNING = ("running_mean", "running_var", "num_batches_tracked")
"""Last part of the names of BatchNorm's buffers, where no model says which tensors are buffers."""

ORTHONORMAL = 1e-13
"""Largest entry of UᴴU − 1 that is let be."""


def project(delta: Tensor, merged: Tensor, alpha: float, *, diagonal: bool = False) -> Tensor:
    """Return C(T; M), the part of `delta` that is to be added to `merged`; shapes (m, n) or (b, m, n), as are both.

    `alpha`: share of Σσ_i that the protected block may hold, see `split_ranks`; `diagonal`: also drop what is parallel
    to any u_i v_iᵀ. Then ⟨C, u_i v_jᵀ⟩ = 0 for i, j < k, and with `diagonal` ⟨C, M⟩ = 0. M = 0 gives C = T.
    Nothing is changed.
    """
    batch = merged.reshape(-1, *merged.shape[-2:])
    left = delta.reshape(batch.shape).clone()
    subtract_projection_(left, delta.reshape(batch.shape), batch, alpha, diagonal)
    return left.reshape(delta.shape)


def fold_(merged: Tensor, delta: Tensor, alpha: float, diagonal: bool) -> list[int]:
    """Add C(delta; merged) to `merged`, both (b, m, n), in place; return the split ranks k, one per matrix.

    The first delta enters whole: C(T; 0) = T. `merged` is Y = λM of the paper, whose direction is all that C needs.
    """
    basis = _basis(merged, delta.dtype, alpha, diagonal)
    merged += delta
    _subtract_(merged, delta, basis, diagonal)
    return basis[2].tolist()


def subtract_projection_(target: Tensor, delta: Tensor, merged: Tensor, alpha: float, diagonal: bool) -> None:
    """Subtract T − C(T; M) from `target` in place; all (b, m, n)."""
    _subtract_(target, delta, _basis(merged, delta.dtype, alpha, diagonal), diagonal)


def split_ranks(sigma: Tensor, alpha: float) -> Tensor:
    """Return k = the first index with Σ_{i≤k} σ_i / Σ_i σ_i > alpha, per row of `sigma` (b, r), falling; int64 (b,).

    So the first k values hold no more than the share `alpha` of the sum: k = 0 at alpha = 0, where the largest alone
    is more. At alpha = 1 nothing exceeds it, and k is the rank, the number of σ_i > 0 (public code has k = 0 there).
    """
    rank = (sigma > 0).sum(-1)
    if alpha >= 1:
        return rank
    total = sigma.sum(-1, keepdim=True)
    return torch.minimum(((sigma.cumsum(-1) <= alpha * total) & (sigma > 0)).sum(-1), rank)


Array = NDArray[np.float64]

Basis = tuple[Tensor, Tensor, Tensor]
"""U (b, m, r), V (b, n, r), split ranks k (b,); columns past a matrix's own rank (or k) are zero."""


def _basis(merged: Tensor, dtype: torch.dtype, alpha: float, every: bool) -> Basis:
    """Return, in `dtype`, the singular vectors that a projection needs: the first k, or with `every` all above the
    cutoff."""
    if merged.shape[-2] < merged.shape[-1]:
        v, u, ranks = _basis(merged.mH, dtype, alpha, every)
        return u, v, ranks
    found = None if every else _by_gram(merged, dtype, alpha)
    u, v, ranks = found or _by_svd(merged, alpha, every)
    return u.to(dtype), v.to(dtype), ranks


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _by_svd(merged: Tensor, alpha: float, every: bool) -> Basis:
    u, sigma, vh = torch.linalg.svd(_wide(merged), full_matrices=False)
    if sigma.shape[-1]:
        cutoff = sigma[:, :1] * (max(merged.shape[-2:]) * torch.finfo(sigma.dtype).eps)
        sigma = torch.where(sigma > cutoff, sigma, 0)
    ranks = split_ranks(sigma, alpha)
    taken = (sigma > 0).sum(-1) if every else ranks
    r = int(taken.max())
    kept = (torch.arange(r, device=merged.device) < taken[:, None])[:, None]
    return u[:, :, :r] * kept, vh[:, :r].mH * kept, ranks


def _by_gram(merged: Tensor, dtype: torch.dtype, alpha: float) -> Basis | None:
    """Return the first k vectors of each matrix; None where the Gram matrix is too coarse for them."""
    n = merged.shape[-1]
    wide = _wide(merged)
    found = None
    if len(merged) == 1 and n > SMALL and wide.device.type == "cpu" and not wide.is_complex():
        found = _by_tridiagonal(wide[0], alpha)
    if found is None:
        values, vectors = torch.linalg.eigh(wide.mH @ wide)
        sigma = _singular_values(values.flip(-1))
        ranks = split_ranks(sigma, alpha)
        r = int(ranks.max())
        right = vectors[:, :, n - r :].flip(-1)
    else:
        sigma, right, ranks = found
        r = right.shape[-1]
    kept = torch.arange(r, device=merged.device) < ranks[:, None]
    least = torch.where(kept, sigma[:, :r] / sigma[:, :1], 1).amin().item() if r else 1.0
    if least < SQUARED:
        return None
    right = right * kept[:, None]
    easy = least >= EASY
    source = merged if easy and merged.dtype == dtype else wide
    left = source @ right.to(source.dtype) / torch.where(kept, sigma[:, :r], 1)[:, None].to(source.dtype)
    return left if easy else _orthonormal(left, kept), right, ranks


def _singular_values(squares: Tensor) -> Tensor:
    """Return σ from the falling eigenvalues (b, n) of Gram matrices, zero where rounding may have made them."""
    cutoff = squares[:, :1] * (max(squares.shape[-1], 64) * torch.finfo(squares.dtype).eps)
    return torch.where(squares > cutoff, squares, 0).clamp(min=0).sqrt()


def _by_tridiagonal(matrix: Tensor, alpha: float) -> Basis | None:
    """Return σ (1, n) falling, V_k (1, n, k) and k of one real matrix on the CPU: one reduction of the Gram matrix to
    tridiagonal form gives all σ, and then as many vectors as are needed. None where LAPACK does not converge."""
    from scipy.linalg import blas  # takes 0.1 CPU-s to import

    n = matrix.shape[1]
    if matrix.mT.is_contiguous():
        gram = blas.dsyrk(1.0, matrix.numpy(), trans=1, lower=1)
    else:
        gram = blas.dsyrk(1.0, matrix.contiguous().numpy().T, lower=1)
    reduced, d, e, tau, info = _call("dsytrd", gram, lower=1, lwork=64 * n, overwrite_a=1)
    values, fault = _call("dsterf", d.copy(), e.copy())
    if info or fault:
        return None
    sigma = _singular_values(torch.from_numpy(values[::-1].copy())[None])
    ranks = split_ranks(sigma, alpha)
    r = int(ranks)
    if r == 0:
        return sigma, matrix.new_zeros(1, n, 0), ranks
    columns = _last_vectors(d, e, values, r)
    if columns is None:
        return None
    columns[1:], _, info = _call(
        "dormqr", "L", "N", np.asfortranarray(reduced[1:, : n - 1]), tau, columns[1:].copy("F"), 64 * max(r, 1)
    )
    return None if info else (sigma, torch.from_numpy(columns).flip(-1)[None], ranks)


def _last_vectors(d: Array, e: Array, values: Array, r: int) -> Array | None:
    """Return the eigenvectors of the r largest eigenvalues of a tridiagonal matrix; None where LAPACK finds none."""
    n = len(d)
    if r <= SUBSET * n:
        whole = np.ones(n, dtype=np.int32)
        vectors, info = _call("dstein", d, e, values[n - r :], whole, n * whole)  # as one block, 1 … n
        if not info and np.abs(vectors.T @ vectors - np.eye(r)).max() <= ORTHONORMAL:
            return vectors
    off_diagonal = np.append(e, 0.0)  # LAPACK works in it
    found, _, vectors, info = _call("dstemr", d.copy(), off_diagonal, 0, 0.0, 0.0, 1, n, lwork=18 * n, liwork=10 * n)
    return None if info or found != n else np.asfortranarray(vectors[:, n - r :])


def _call(name: str, *args: Any, **options: Any) -> tuple[Any, ...]:
    """Call a LAPACK routine; its stubs know no overloads for arrays that it works in."""
    from scipy.linalg import lapack

    return cast(tuple[Any, ...], getattr(lapack, name)(*args, **options))


def _orthonormal(u: Tensor, kept: Tensor) -> Tensor:
    """Return the nearest matrices with orthonormal columns (Newton's iteration for the polar factor): M V Σ⁻¹ is
    orthonormal up to ε σ_1² / (σ_i σ_j) only."""
    one = torch.diag_embed(kept.to(u.dtype))
    for _ in range(6):
        error = u.mH @ u - one
        if not error.numel() or float(error.abs().max()) <= ORTHONORMAL:
            break
        u = u - u @ error * 0.5
    return u


def _subtract_(target: Tensor, delta: Tensor, basis: Basis, diagonal: bool) -> None:
    """Subtract T − C from `target` in place."""
    u, v, ranks = basis
    k = int(ranks.max()) if len(ranks) else 0
    if u.shape[-1] == 0 or (k == 0 and not diagonal):
        return
    mapped = delta @ v
    first = torch.arange(k, device=u.device) < ranks[:, None]
    block = (u[:, :, :k].mH @ mapped[:, :, :k]) * first[:, :, None] * first[:, None]
    factor = u[:, :, :k] @ block
    if diagonal:
        d = (u.conj() * mapped).sum(-2)
        block.diagonal(dim1=-2, dim2=-1).zero_()
        factor = torch.cat([u[:, :, :k] @ block, u.new_zeros(*u.shape[:2], u.shape[-1] - k)], -1) + u * d[:, None]
    else:
        v = v[:, :, :k]
    target.baddbmm_(factor, v.mH, alpha=-1)


@dataclass(frozen=True)
class Meta:
    """A tensor's shape and type, and where it is computed with: where own is, if that device knows float64."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class FoldLayout:
    """The tensors that are folded, and how. `folded`: parameters by name, each once; `tied`: further name of
    one → its first; `averaged`: floating-point buffers; `vectors`: depthwise kernels; `split`: parts and dim."""

    meta: Mapping[str, Meta]
    folded: tuple[str, ...]
    tied: Mapping[str, str]
    averaged: frozenset[str]
    vectors: frozenset[str]
    split: Mapping[str, tuple[int, int]]

    @staticmethod
    def of(own: Weights, model: nn.Module | None, split: Mapping[str, Split]) -> FoldLayout:
        """Return the layout of `own`; MergeError or ConfigError for a split that fits no tensor."""
        places: dict[object, str] = {}
        same = {} if model is None else {name: id(p) for name, p in model.state_dict(keep_vars=True).items()}
        buffers = None if model is None else {name for name, _ in model.named_buffers(remove_duplicate=False)}
        vectors: set[str] = set() if model is None else _depthwise(model)
        meta: dict[str, Meta] = {}
        tied: dict[str, str] = {}
        folded: list[str] = []
        averaged: set[str] = set()
        for name in sorted(own):  # a dict and a file of it have one order, and so one hash
            tensor = own[name]
            if not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            device = torch.device("cpu") if tensor.device.type == "mps" else tensor.device
            meta[name] = Meta(tensor.shape, tensor.dtype, device)
            if name.rpartition(".")[2] in RUNNING if buffers is None else name in buffers:
                averaged.add(name)
                continue
            # addresses say something of tensors that live on, not of those that a file hands out one by one
            keys: list[object] = [same[name]] if name in same else []
            if isinstance(own, dict) and tensor.numel():
                keys.append((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, device))
            first = next((places[key] for key in keys if key in places), name)
            places.update((key, first) for key in keys)
            if first != name:
                tied[name] = first
                continue
            folded.append(name)
            if model is None and tensor.ndim > 2 and tensor.shape[1] == 1:
                vectors.add(name)
        return FoldLayout(
            meta, tuple(folded), tied, frozenset(averaged), frozenset(vectors), _splits(split, meta, folded)
        )

    def batches(self) -> Iterator[list[str]]:
        """Give the folded names, one at a time on the CPU, else those of equal shape together."""
        groups: dict[object, list[str]] = {}
        for name in self.folded:
            meta = self.meta[name]
            together = max(1, TOGETHER // max(meta.shape.numel(), 1)) if meta.device.type != "cpu" else 1
            key = (meta, self.split.get(name), name in self.vectors)
            group = groups.setdefault(key, [])
            group.append(name)
            if len(group) == together:
                yield groups.pop(key)
        yield from groups.values()

    def fold_(self, name: str, total: Tensor, delta: Tensor, alpha: float, diagonal: bool) -> None:
        """Fold deltas (b, *shape) of tensors like `name` into `total` in place, each as what it is."""
        if total.ndim < 3 or name in self.vectors or not total.numel():
            total += delta
            return
        parts, dim = self.split.get(name, (1, 0))
        for merged, added in zip(total.chunk(parts, dim + 1), delta.chunk(parts, dim + 1)):
            if merged.ndim > 3:  # a part along dim 0 is dense, along another dim only a matrix can be split
                merged, added = merged.flatten(2), added.flatten(2)
            fold_(merged, added, alpha, diagonal)


def _depthwise(model: nn.Module) -> set[str]:
    """Return the names of the kernels of convolutions that have one input channel per group, and several groups."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module.groups == module.in_channels > 1
    }


def _splits(split: Mapping[str, Split], meta: Mapping[str, Meta], folded: list[str]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for pattern, how in split.items():
        parts, dim = (how, 0) if isinstance(how, int) else how
        names = [name for name in folded if fnmatchcase(name, pattern)]
        if not names:
            raise ConfigError(f"split: no tensor matches {pattern!r}; the first are {folded[:3]}")
        for name in names:
            shape = meta[name].shape
            if len(shape) < 2 and dim == 0:
                continue  # the bias of what is split
            if dim >= len(shape) or (dim and len(shape) > 2):
                raise MergeError(f"split: tensor {name!r} is {[*shape]} and cannot be split along dim {dim}")
            if shape[dim] % parts:
                raise MergeError(f"split: dim {dim} of tensor {name!r} is {shape[dim]}, not {parts} equal parts")
            found[name] = (parts, dim)
    return found
