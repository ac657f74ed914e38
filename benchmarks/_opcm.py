"""OPCM beside its formula written out: one more task folded onto a merged delta, at the sizes of a CLIP ViT-B/32.

The formula takes a full SVD of the merged delta for every matrix, in float32, as the papers' programs do:

    M = UΣVᵀ,  A = Uᵀ T V,  A[:k, :k] = 0 (with `diagonal` A_ii = 0 too),  C = U A Vᵀ,  Y = λM + C,  M ← Y mean‖T‖/‖Y‖

Both sides do the whole step, from weights to weights, on the same tensors: q, k, v, out, fc1 and fc2 of each block,
the embeddings and the two projections as matrices, the rest as vectors. Deltas are random with a spectrum that falls:
M and T = L diag(i^−½) R with Gaussian L and R, and their entries small beside the base's, as after fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import process_time
from typing import Any

import torch
from torch import Tensor

from dimat.merge.combine.opcm import Fold, Party, opcm
from dimat.merge.tensors.projection import FoldLayout

WIDTH, INNER, OUT, PATCH, POSITIONS = 768, 3072, 512, 3 * 32 * 32, 50
ALPHA = 0.5

Model = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One side of one variant. `products`: option of dimat's, None for the formula."""

    diagonal: bool
    products: str | None
    cpu_s: float
    error: float


def shapes(blocks: int) -> dict[str, tuple[int, ...]]:
    """The tensors of the vision half of CLIP ViT-B/32."""
    found: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (WIDTH,),
        "embeddings.patch_embedding.weight": (WIDTH, PATCH),
        "embeddings.position_embedding.weight": (POSITIONS, WIDTH),
        "visual_projection.weight": (OUT, WIDTH),
    }
    linear = {f"self_attn.{part}_proj": (WIDTH, WIDTH) for part in ("q", "k", "v", "out")}
    linear |= {"mlp.fc1": (INNER, WIDTH), "mlp.fc2": (WIDTH, INNER)}
    for block in range(blocks):
        for layer, shape in linear.items():
            found |= {f"layers.{block}.{layer}.weight": shape, f"layers.{block}.{layer}.bias": shape[:1]}
        found |= {f"layers.{block}.layer_norm{k}.{kind}": (WIDTH,) for k in (1, 2) for kind in ("weight", "bias")}
    return found


def _delta(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.randn(shape, generator=g) * 1e-4
    rank = min(shape)
    falling = torch.arange(1, rank + 1) ** -0.5
    left, right = (torch.randn(*pair, generator=g) for pair in ((shape[0], rank), (rank, shape[1])))
    delta = (left * falling) @ right
    return delta * (1e-4 / float(delta.std()))


def weights(blocks: int) -> tuple[Model, Model, Model]:
    """Return a base, what was merged onto it so far, and the weights of one more task: the one of the two that dimat
    takes first, by its hash, is what was merged."""
    g = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=g) * 0.02 for name, shape in shapes(blocks).items()}
    merged, task = ({name: t + _delta((*t.shape,), g) for name, t in base.items()} for _ in range(2))
    fold = Fold(FoldLayout.of(base, None, {}), base, ALPHA, False, torch.float64)
    first, second = fold.survey([Party("", merged), Party("task", task)])
    return (base, merged, task) if first.digest < second.digest else (base, task, merged)


def plain(base: Model, merged: Model, task: Model, diagonal: bool) -> Model:
    """Fold one task by the formula in float32; return the merged weights."""
    return _step(base, merged, task, lambda m, t: [_formula(*_decomposed(m), t, diagonal)], torch.float32)[0]


def exact(base: Model, merged: Model, task: Model) -> list[Model]:
    """The same in float64, for `diagonal` False and True, from one SVD each."""

    def both(m: Tensor, t: Tensor) -> list[Tensor]:
        parts = _decomposed(m)
        return [_formula(*parts, t, diagonal) for diagonal in (False, True)]

    return _step(base, merged, task, both, torch.float64)


def _step(
    base: Model, merged: Model, task: Model, project: Callable[[Tensor, Tensor], list[Tensor]], dtype: torch.dtype
) -> list[Model]:
    sums: list[Model] = []
    squares = [0.0, 0.0]
    for name, start in base.items():
        m, t = merged[name].to(dtype) - start.to(dtype), task[name].to(dtype) - start.to(dtype)
        squares = [total + float(torch.linalg.vector_norm(x)) ** 2 for total, x in zip(squares, (m, t))]
        for k, c in enumerate(project(m, t) if m.ndim == 2 else [t] * max(len(sums), 1)):
            sums += [{}] * (k == len(sums))
            sums[k][name] = m + c  # λ = 1: one task was merged
    length = (squares[0] ** 0.5 + squares[1] ** 0.5) / 2
    for found in sums:
        factor = length / sum(float(torch.linalg.vector_norm(y)) ** 2 for y in found.values()) ** 0.5
        for name, y in found.items():
            found[name] = y.mul_(factor).add_(base[name])
    return sums


def _decomposed(m: Tensor) -> tuple[Tensor, Tensor, int]:
    u, sigma, vh = torch.linalg.svd(m, full_matrices=True)
    return u, vh, int((sigma.cumsum(0) / sigma.sum() > ALPHA).nonzero()[0])


def _formula(u: Tensor, vh: Tensor, k: int, t: Tensor, diagonal: bool) -> Tensor:
    a = u.T @ t @ vh.T
    a[:k, :k] = 0
    if diagonal:
        a.diagonal().zero_()
    return u @ a @ vh


def ours(base: Model, merged: Model, task: Model, diagonal: bool, products: Any) -> Model:
    """Fold one task by dimat; return the merged weights."""
    options: dict[str, Any] = {"alpha": ALPHA, "diagonal": diagonal, "products": products}
    return opcm(merged, [task], [0.5, 0.5], base=base, **options)


def cost(blocks: int, turns: int) -> list[Row]:
    """Return CPU-seconds (the least of some turns, which the sides take one after the other) and errors."""
    models = weights(blocks)
    rows: list[Row] = []
    for diagonal, reference in zip((False, True), exact(*models)):
        sides = (None, "float32", "float64")
        seconds, errors = [float("inf")] * 3, [0.0] * 3
        for _ in range(turns):
            for i, products in enumerate(sides):
                began = process_time()
                found = side(models, diagonal, products)
                seconds[i] = min(seconds[i], process_time() - began)
                errors[i] = _error(models[0], found, reference)
                del found
        rows += [Row(diagonal, *row) for row in zip(sides, seconds, errors)]
    return rows


def side(models: tuple[Model, Model, Model], diagonal: bool, products: str | None) -> Model:
    """Fold by the formula (`products` None) or by dimat."""
    return plain(*models, diagonal) if products is None else ours(*models, diagonal, products)


def _error(base: Model, found: Model, reference: Model) -> float:
    """Return the largest of ‖θ − θ_exact‖ / ‖θ_exact − θ_base‖ over tensors, θ_exact as float32 has it: the last bit of
    weights that are hundreds of times as large as their deltas is no error of the fold."""
    return max(float((found[n] - e.float()).norm() / (e - base[n]).norm()) for n, e in reference.items())
