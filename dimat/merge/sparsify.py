"""Which elements of a delta stay: thresholds within a tensor or over a whole model, and random drops.

A threshold keeps every element that equals it, so what stays does not depend on the order of elements. Magnitudes
are compared in float32. Order statistics of a whole model stream over its tensors and are exact: two passes of counts
over the upper and the lower half of the bits of float32, whose order as integers is their order as numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from dimat.errors import MergeError
from dimat.seeds import torch_generator

BINS = 1 << 16
CHUNK = 1 << 20
"""Elements that are counted at a time."""

Passes = Callable[[], Iterable[Sequence[Tensor]]]
"""Starts a pass: for each tensor, the values of every model."""

Ranks = Callable[[int], Sequence[int]]
"""Number of elements → the 0-based ascending ranks that are asked for."""


def magnitudes(delta: Tensor) -> Tensor:
    """Return |τ| in float32."""
    return delta.abs().to(torch.float32)


def kept_of(density: float, elements: int) -> int:
    """Return how many of `elements` stay: ⌊density · elements⌋, at least 1, so that no tensor is cut away whole."""
    return min(elements, max(1, int(density * elements)))


def ranked(values: Tensor, rank: int) -> Tensor:
    """Return the value of a 0-based ascending rank, as a tensor without axes."""
    flat = values.flatten()
    if flat.device.type == "cpu":  # several times faster than kthvalue
        return torch.from_numpy(np.partition(flat.numpy(), rank)[rank : rank + 1])[0]
    return flat.kthvalue(rank + 1).values


def keep_largest(delta: Tensor, density: float) -> Tensor:
    """Return a tensor with all but the `density` share of largest magnitude set to zero. A tensor is never cut away
    whole: at least one element stays."""
    kept = kept_of(density, delta.numel())
    if kept == delta.numel():
        return delta
    size = magnitudes(delta)
    return delta.masked_fill(size < ranked(size, delta.numel() - kept), 0.0)


def order_statistics(passes: Passes, ranks: Ranks) -> list[list[float]]:
    """Return for each model the values at the ranks of all its elements, as float32 has them.

    Two passes; memory is a table of 65,536 counts per model and (model, rank), whatever the model's size.
    """
    coarse: list[Tensor] = []
    for tensors in passes():
        if not coarse:
            coarse = [torch.zeros(BINS, dtype=torch.int64, device=tensor.device) for tensor in tensors]
        for table, tensor in zip(coarse, tensors):
            for keys in _keys(tensor):
                table += torch.bincount(keys >> 16, minlength=BINS)
    if not coarse:
        raise MergeError("the weights hold no floating-point tensor, so there is nothing to rank")
    wanted = [[_find(table, rank) for rank in ranks(int(table.sum()))] for table in coarse]
    fine = [{bin: torch.zeros_like(table) for bin, _ in found} for table, found in zip(coarse, wanted)]
    for tensors in passes():
        for tables, tensor in zip(fine, tensors):
            for keys in _keys(tensor):
                for bin, table in tables.items():
                    table += torch.bincount(keys[keys >> 16 == bin] & (BINS - 1), minlength=BINS)
    return [
        [_value((bin << 16) + _find(tables[bin], rank)[0]) for bin, rank in found]
        for tables, found in zip(fine, wanted)
    ]


def _keys(tensor: Tensor) -> Iterator[Tensor]:
    """Yield float32 values as integers in [0, 2^32) of the same order, some at a time."""
    for chunk in tensor.flatten().split(CHUNK):
        bits = (chunk.to(torch.float32) + 0.0).view(torch.int32)  # + 0 makes −0 equal to 0
        yield (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64) + (1 << 31)


def _value(key: int) -> float:
    """Return the float32 value of a key."""
    bits = key - (1 << 31)
    return float(torch.tensor(bits ^ ((bits >> 31) & 0x7FFFFFFF), dtype=torch.int32).view(torch.float32))


def _find(table: Tensor, rank: int) -> tuple[int, int]:
    """Return the bin that holds a rank, and the rank within the bin."""
    sums = table.cumsum(0)
    bin = int(torch.searchsorted(sums, torch.tensor(rank, device=sums.device), right=True))
    return bin, rank - (int(sums[bin - 1]) if bin else 0)


def root_of(generator: torch.Generator | None, method: str) -> int:
    """Draw the seed of one merge from a generator; MergeError where there is none."""
    if generator is None:
        raise MergeError(f"combine method {method!r} draws at random: hand in generator=, seeded")
    return int(torch.randint(2**62, (1,), generator=generator, device=generator.device))


def drop(delta: Tensor, keep: float | Tensor, root: int, name: str) -> Tensor:
    """Return a delta with each element kept with probability `keep` and zero otherwise.

    The draw is fixed by `root`, the tensor's name and the delta's own content, so it does not matter which place
    among the models a delta has, and equal deltas are dropped alike.
    """
    content = delta.detach().to("cpu", torch.float32).contiguous()
    digest = blake3(content.reshape(-1).numpy().data.cast("B")).hexdigest()
    draw = torch.rand(content.shape, generator=torch_generator(root, "drop", name, digest))
    return delta * (draw.to(delta.device) < keep)
