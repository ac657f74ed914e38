"""LoRA adapters: finds factors in pairs by name, and merges them as their products.

An adapter adds ΔW = s·B·A to a weight (out, in). PEFT names the factors of a module `<module>.lora_A.weight` (r, in)
and `<module>.lora_B.weight` (out, r), with the adapter's name before `.weight` in a living model (`lora_A.default`);
of an embedding `<module>.lora_embedding_A` (r, rows) and `lora_embedding_B` (width, r), whose product is the weight's
delta transposed; of a convolution A (r, in, height, width) and B (out, r, 1, 1). As (B R, R⁻¹ A) is the same ΔW for
every invertible R, the mean of factors is not a merge of adapters unless all began with the same A and stayed near it.

Combine methods assume that all models have the same scale s, as one configuration trains them; then s does not matter.
Models whose scales differ come here with s in B.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dimat.errors import MergeError
from dimat.merge.stages import Weights
from dimat.merge.tensors.streaming import combine_tensors
from dimat.merge.tensors.task_vectors import mean_of

FACTOR = re.compile(
    r"(?:(?P<module>.+)\.)?lora_(?:(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
    r"|embedding_(?P<embedded>[AB])(?:\.(?P<named>[^.]+))?)"
)


@dataclass(frozen=True)
class FactorPair:
    """Two factors by the names of their tensors. `key`: the module, and the adapter's name where it has one other
    than "default"; the same in all models."""

    key: str
    a: str
    b: str
    embedding: bool


@dataclass(frozen=True)
class Factors:
    """One model's ΔW = `b` · `a` as matrices: `a` (r, columns), `b` (rows, r)."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]


MergeFactors = Callable[[Factors, list[Factors], list[float]], Factors]
"""(own's, those of all models whose weight is not 0, their weights) → merged factors, of any rank."""


def find_pairs(names: Iterable[str]) -> list[FactorPair]:
    """Return the pairs of factors among tensor names; MergeError, naming it, for a factor that is alone."""
    found: dict[tuple[str, bool], dict[str, str]] = {}
    for name in names:
        match = FACTOR.fullmatch(name)
        if match:
            adapter = match["adapter"] or match["named"] or "default"
            key = (match["module"] or "") + ("" if adapter == "default" else f"[{adapter}]")
            found.setdefault((key, match["side"] is None), {})[match["side"] or match["embedded"]] = name
    for sides in found.values():
        if len(sides) < 2:
            side, name = next(iter(sides.items()))
            raise MergeError(
                f"tensor {name!r} is a LoRA factor without its lora_{'B' if side == 'A' else 'A'}; both are needed"
            )
    return [FactorPair(key, sides["A"], sides["B"], embedding) for (key, embedding), sides in found.items()]


def factors_of(a: Tensor, b: Tensor, pair: FactorPair, of: str = "") -> Factors:
    """Return two tensors as matrices in float64 (float32 where the device has no float64).

    Raises MergeError where they do not fit each other or hold values that are not finite; `of` says whose they are.
    """
    if a.ndim < 2 or b.ndim < 2 or b.flatten(1).shape[1] != a.shape[0]:
        raise MergeError(f"{of}LoRA factors {pair.a!r} {[*a.shape]} and {pair.b!r} {[*b.shape]} have no product B·A")
    wide = torch.float32 if a.device.type == "mps" else torch.float64
    left, right = b.detach().to(a.device, wide).flatten(1), a.detach().to(wide).flatten(1)
    for name, tensor in ((pair.a, right), (pair.b, left)):
        if not torch.isfinite(tensor).all():
            raise MergeError(f"{of}tensor {name!r} holds values that are not finite")
    return Factors(right, left)


def merge_products(own: Weights, peers: Sequence[Weights], weights: Sequence[float], merge: MergeFactors) -> Weights:
    """Return own's tensors with each pair of factors replaced by `merge`'s, and all other tensors averaged.

    Peers' factors may be of other ranks than own's. Raises MergeError for factors that do not fit.
    """
    pairs = {name: pair for pair in find_pairs(own) for name in (pair.a, pair.b)}
    ready: dict[str, Tensor] = {}

    def one(name: str, start: Tensor, others: list[Tensor]) -> Tensor:
        if name not in pairs:
            return mean_of([start, *others], weights)
        if name not in ready:
            a, b = _merge_pair(own, peers, weights, pairs[name], merge)
            ready.update({pairs[name].a: a, pairs[name].b: b})
        return ready.pop(name)

    return combine_tensors(own, peers, one, grows=True)


def _merge_pair(
    own: Weights, peers: Sequence[Weights], weights: Sequence[float], pair: FactorPair, merge: MergeFactors
) -> tuple[Tensor, Tensor]:
    a, b = own[pair.a], own[pair.b]
    mine = factors_of(a, b, pair)
    parts = [mine] if weights[0] else []
    for i, (peer, weight) in enumerate(zip(peers, weights[1:])):
        if weight:
            theirs = factors_of(peer[pair.a].to(a.device), peer[pair.b], pair, f"peer {i}: ")
            if theirs.a.shape[1] != mine.a.shape[1] or theirs.b.shape[0] != mine.b.shape[0]:
                raise MergeError(
                    f"peer {i}: LoRA factors {pair.a!r} {[*peer[pair.a].shape]} and {pair.b!r} "
                    f"{[*peer[pair.b].shape]} do not fit own, {[*a.shape]} and {[*b.shape]}"
                )
            parts.append(theirs)
    merged = merge(mine, parts, [weight for weight in weights if weight])
    shapes = (merged.rank, *a.shape[1:]), (b.shape[0], merged.rank, *b.shape[2:])
    return merged.a.reshape(shapes[0]).clone(), merged.b.reshape(shapes[1]).clone()  # never memory of a model's


def merged_rank(rank: int | None, own: int, ranks: Sequence[int]) -> int:
    """Return the rank of merged factors: `rank`, own's if None; no more than the ranks of all that take part."""
    return own if rank is None else min(rank, sum(ranks))


def nothing_to_merge(parts: Sequence[Factors], rank: int, scaling: float) -> bool:
    """Tell whether the first factors are the merged ones: they are alone, or all are the same, and the rank stays."""
    first = parts[0]
    if first.rank != rank or (scaling != 1 and len(parts) > 1):
        return False
    return all(torch.equal(part.a, first.a) and torch.equal(part.b, first.b) for part in parts[1:])


def concatenated(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Return factors of Σ_k w_k B_k A_k: B = [w_1 B_1, w_2 B_2, …], A = [A_1; A_2; …]."""
    a = torch.cat([part.a for part in parts])
    return Factors(a, torch.cat([part.b * weight for part, weight in zip(parts, weights)], 1))


def compressed(factors: Factors, rank: int) -> Factors:
    """Return the factors of a rank whose product is closest to B·A in Frobenius norm: U √σ and √σ Vᵀ of its SVD.

    B = Q R and Aᵀ = P S leave the SVD of R Sᵀ, which is as small as the ranks. A direction of σ = 0 gets a zero in B
    and a row of the smallest √σ in A, where A has one to give: it adds nothing, and yet training can move it; both
    zero would stay zero. Rows beyond are zero.
    """
    left, core_b = torch.linalg.qr(factors.b)
    right, core_a = torch.linalg.qr(factors.a.mT)
    u, sigma, v = torch.linalg.svd(core_b @ core_a.mT, full_matrices=False)
    kept = min(rank, len(sigma))
    rounding = factors.rank * torch.finfo(sigma.dtype).eps * core_b.norm() * core_a.norm()
    sigma = sigma[:kept]
    known = sigma > rounding
    root = torch.where(known, sigma, 0.0).sqrt()
    spare = root[known][-1:].expand(kept) if known.any() else torch.zeros_like(root)
    a = torch.zeros(rank, factors.a.shape[1], dtype=sigma.dtype, device=sigma.device)
    b = torch.zeros(factors.b.shape[0], rank, dtype=sigma.dtype, device=sigma.device)
    a[:kept] = torch.where(known, root, spare)[:, None] * (v[:kept] @ right.mT)
    b[:, :kept] = (left @ u[:, :kept]) * root
    return Factors(a, b)
