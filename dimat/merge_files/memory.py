"""Estimates the memory that a merge of files needs, before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from dimat.merge.stages import Weights
from dimat.registry import Bound
from dimat.weights.header import TensorInfo

NEAR = 1 / 8
"""Most values of a tensor that a search for a threshold collects from each model, as float32."""

PROCESS = 300_000_000
"""Bytes of Python, torch and its libraries."""

WORK = 3
"""Number of tensors that a method holds besides its inputs, in the type in which it sums."""


def peak_memory(method: Bound[Weights], tensors: Sequence[TensorInfo], models: int, base: bool) -> int:
    """Return the approximate memory in bytes of a merge, besides mapped files: the merged tensor if a method works in
    pieces, else the largest tensor in the type in which it is summed, once for each model (twice if deltas are taken,
    and once for the base), plus working space."""
    if method.traits["holds"] == "pieces":  # the merged tensor, and a few of all values in search of a threshold
        return PROCESS + max((info.bytes + int(NEAR * 4 * models * info.elements) for info in tensors), default=0)
    largest = max((info.elements * _sum_width(info) for info in tensors), default=0)
    return PROCESS + largest * ((2 * models + 1 if base else models) + WORK)


def whole_memory(
    methods: Sequence[Bound[Weights]], tensors: Sequence[TensorInfo], models: int, base: bool, width: int
) -> int:
    """Return the approximate memory in bytes of a merge that runs its models: all of them, the network, the merged
    tensors, and deltas if a method holds them, at `width` bytes per number. Activations come on top."""
    held = models + base + 2 + (models if any(method.traits["holds"] == "deltas" for method in methods) else 0)
    return PROCESS + held * width * sum(info.elements for info in tensors)


def shown(count: int) -> str:
    """Return a number of bytes in readable form: 1.5 GB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{ceil(count / size * 10) / 10:,} {unit}"
    return f"{count} bytes"


def _sum_width(info: TensorInfo) -> int:
    """Return the bytes per element in which tensors like this are summed."""
    return max(8 if info.dtype.itemsize >= 4 else 4, info.dtype.itemsize)
