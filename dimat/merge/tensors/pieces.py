"""Tensors worked on in pieces, so that an element-by-element merge stays in the cache.

Only pieces are turned into the accumulating type, so that a merge of mapped files needs little more memory than its
result, and each value is loaded from memory once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

PIECE = 1 << 15
"""Elements of a piece on the CPU: the most that torch leaves to one thread. Short operations on several threads wait
for each other far longer than they work wherever a processor is busy with something else."""

SAMPLE = 1 << 14
"""Elements that are looked at to guess where an order statistic lies."""


LEAST = 16
"""Pieces that are worth a thread."""

MergePieces = Callable[[list[Tensor]], Tensor]
"""Values of every model at some elements, flat, real and in the accumulating type → merged values."""

T = TypeVar("T")


def in_threads(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Return what functions return that run side by side, on as many threads as torch is allowed."""
    threads = min(torch.get_num_threads(), len(tasks))
    if threads <= 1:
        return [task() for task in tasks]
    with ThreadPoolExecutor(threads) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


def accumulator(tensor: Tensor) -> torch.dtype:
    """Return the type in which tensors like this are summed: float64 for float32 and above, float32 for half types."""
    if tensor.is_complex():
        return torch.complex128
    if tensor.dtype in (torch.float32, torch.float64) and tensor.device.type != "mps":  # MPS has no float64
        return torch.float64
    return torch.float32


def real(tensor: Tensor) -> Tensor:
    """Return a tensor of real numbers: complex ones get a last axis of real and imaginary parts."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


class Pieces:
    """One tensor of each of some models, to be gone through in pieces: flat, real, in the accumulating type.

    With `base`, a tensor of the same shape, they are deltas τ_k = θ_k − θ_base. All tensors are moved to the device
    of `like`, whose type decides the accumulating one. `size`: elements of a piece; on other devices than the CPU
    there is one piece. Pieces are new tensors, free to be written to.
    """

    def __init__(self, tensors: Sequence[Tensor], like: Tensor, base: Tensor | None = None, size: int = PIECE) -> None:
        self._like = like
        self.dtype = real(torch.empty(0, dtype=accumulator(like))).dtype
        self.size = size if like.device.type == "cpu" else max(1, real(like).numel())
        self._tensors = tensors
        self._origin = base
        self._models = [self.cut(tensor) for tensor in tensors]
        self._base = None if base is None else self.cut(base)

    def __len__(self) -> int:
        """Number of models."""
        return len(self._models)

    @property
    def elements(self) -> int:
        """Number of (real) elements of each tensor."""
        return real(self._like).numel()

    def cut(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return a tensor of this shape in the pieces, in its own type; they share its memory where it is dense."""
        return self._flat(tensor).split(self.size)

    def _flat(self, tensor: Tensor) -> Tensor:
        return real(tensor.detach().to(self._like.device)).reshape(-1)

    def of(self, model: int) -> Iterator[Tensor]:
        """Yield the pieces of one model."""
        if self._base is None:
            return (piece.to(self.dtype, copy=True) for piece in self._models[model])
        pairs = zip(self._models[model], self._base)
        return (piece.to(self.dtype, copy=True).sub_(base.to(self.dtype)) for piece, base in pairs)

    def __iter__(self) -> Iterator[list[Tensor]]:
        """Yield, piece by piece, the values of every model."""
        return (values for _, values in self._between(0, None))

    def merged(self, merge: MergePieces, scaling: float = 1.0, ordered: bool = False) -> Tensor:
        """Return the tensor, in the type of `like`, of what `merge` makes of each piece, with deltas θ_base + scaling
        times that. Pieces are shared out to torch's threads, or come in order, one at a time, where `ordered`."""
        whole = torch.empty(self._like.shape, dtype=self._like.dtype, device=self._like.device)
        places = self.cut(whole)

        def fill(start: int, stop: int | None) -> None:
            for place, (origin, values) in zip(places[start:stop], self._between(start, stop)):
                change = merge(values)
                if origin is None:
                    place.copy_(change)
                else:
                    place.copy_(origin.add_(change if scaling == 1 else scaling * change))

        threads = 1 if ordered else min(torch.get_num_threads(), len(places) // LEAST)
        if threads <= 1:
            fill(0, None)
        else:
            cuts = [len(places) * i // threads for i in range(threads + 1)]
            in_threads([partial(fill, *cut) for cut in pairwise(cuts)])
        return whole

    def _between(self, start: int, stop: int | None) -> Iterator[tuple[Tensor | None, list[Tensor]]]:
        """Yield the values of the base, if there is one, and of every model, piece by piece."""
        models = [model[start:stop] for model in self._models]
        if self._base is None:
            yield from ((None, [part.to(self.dtype, copy=True) for part in parts]) for parts in zip(*models))
            return
        for base, *parts in zip(self._base[start:stop], *models):
            origin = base.to(self.dtype, copy=True)
            yield origin, [part.to(self.dtype, copy=True).sub_(origin) for part in parts]

    def sample(self) -> list[Tensor]:
        """Return about SAMPLE values of every model, at the same places, evenly spread."""
        step = max(1, self.elements // SAMPLE)
        chosen = [self._picked(tensor, step) for tensor in self._tensors]
        return chosen if self._origin is None else [values.sub_(self._picked(self._origin, step)) for values in chosen]

    def _picked(self, tensor: Tensor, step: int) -> Tensor:
        return self._flat(tensor)[::step].to(self.dtype, copy=True)

    def products(self) -> Tensor:
        """Return the inner products of the models' values: (models, models), float64, on the CPU."""
        total = torch.zeros(len(self), len(self), dtype=torch.float64)
        for values in self:
            rows = torch.stack(values)
            total += (rows @ rows.mT).cpu()
        return total


PlanPieces = Callable[[str, Pieces], MergePieces]
"""(name, a tensor of each model in pieces) → how a piece is merged: what a tensor decides as a whole (a threshold, an
angle) is found first."""


def alike(merge: MergePieces) -> PlanPieces:
    """Return the plan of methods that merge all elements of all tensors alike."""
    return lambda name, pieces: merge
