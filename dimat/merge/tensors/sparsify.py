"""Which elements of a delta stay: thresholds by tensor or model, and random drops.

A threshold keeps every element that equals it, so what stays does not depend on the order of elements. Magnitudes
are compared in float32. Order statistics of a whole model stream over its tensors and are exact: two passes of counts
over the upper and the lower half of the bits of float32, whose order as integers is their order as numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor
from torch.nn.functional import hardshrink

from dimat.errors import MergeError
from dimat.merge.tensors.pieces import Pieces, in_threads
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


def ranked_among(values: Callable[[], Iterable[Tensor]], sample: Tensor, elements: int, rank: int) -> float:
    """Return the value of a 0-based ascending rank among float32 values that come in pieces.

    `values` starts a pass over all of them; `sample` is some of them. Exact: the values in the range that the sample
    suggests are collected, a few in a hundred; if the rank is not among them, all values are counted.
    """
    if sample.device.type != "cpu" or elements <= 4 * sample.numel():
        return float(ranked(torch.cat([*values()]), rank))
    low, high = _range_of(sample, rank / elements)
    below, near, room = 0, list[np.ndarray[Any, Any]](), elements // 8
    for piece in values():
        numbers = piece.numpy()
        above = numbers >= low
        below += numbers.size - int(np.count_nonzero(above))
        near.append(numbers[above & (numbers <= high)])
        room -= near[-1].size
        if room < 0:
            break
    found = sum(part.size for part in near)
    if room < 0 or not below <= rank < below + found:
        return order_statistics(lambda: ([piece] for piece in values()), lambda _: [rank])[0][0]
    return float(np.partition(np.concatenate(near), rank - below)[rank - below])


def _range_of(sample: Tensor, share: float) -> tuple[float, float]:
    """Return a range that holds, by the look of a sample, the value up to which this share of all values lies."""
    ordered, size = sample.sort().values, sample.numel()
    margin = 4 * (share * (1 - share) * size) ** 0.5 + 2
    places = int(share * size - margin), int(share * size + margin) + 1
    low, high = (float(ordered[min(max(place, 0), size - 1)]) for place in places)
    return (low if places[0] > 0 else -math.inf), (high if places[1] < size else math.inf)


def smallest_kept(pieces: Pieces, densities: Sequence[float]) -> list[float]:
    """Return for each model the smallest magnitude among the share of largest elements given by its density, 0 if all
    stay. At least one element of a tensor always stays."""
    ranks = [pieces.elements - kept_of(density, pieces.elements) for density in densities]
    return [0.0 if found is None else found for found in magnitude_ranks(pieces, [rank or None for rank in ranks])]


def trimmed(delta: Tensor, low: float, high: float = math.inf) -> Tensor:
    """Return a delta without the magnitudes, in float32, below `low` or above `high`, which are float32 numbers."""
    # comparing and masking would be five operations, each slower than the one that shrinks
    kept = delta if low <= 0 else hardshrink(delta, _last_below(low, delta.dtype))
    if high == math.inf:
        return kept
    beyond = float(np.nextafter(np.float32(high), np.float32(math.inf)))
    return kept - hardshrink(kept, _last_below(beyond, delta.dtype))


def _last_below(value: float, dtype: torch.dtype) -> float:
    """Return the largest number of a type that, as a float32, is below a float32 value."""
    before = float(np.nextafter(np.float32(value), np.float32(-math.inf)))
    if dtype != torch.float64 or value == math.inf:
        return before
    middle = before + (value - before) / 2
    return middle if float(np.float32(middle)) < value else math.nextafter(middle, -math.inf)


def magnitude_ranks(pieces: Pieces, ranks: Sequence[int | None]) -> list[float | None]:
    """Return for each model the magnitude of its 0-based ascending rank; None for None, which costs nothing."""
    if not any(rank is not None for rank in ranks):
        return [None] * len(ranks)

    def found(model: int, sample: Tensor, rank: int | None) -> float | None:
        if rank is None:
            return None
        return ranked_among(lambda: map(magnitudes, pieces.of(model)), magnitudes(sample), pieces.elements, rank)

    parts = enumerate(zip(pieces.sample(), ranks))
    return in_threads([partial(found, k, sample, rank) for k, (sample, rank) in parts])


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
        raise MergeError(f"combine method {method!r} draws at random: pass a seeded generator=")
    return int(torch.randint(2**62, (1,), generator=generator, device=generator.device))


def draws(pieces: Pieces, root: int, name: str) -> list[Iterator[Tensor]]:
    """Return for each model random numbers in [0, 1), float32, in the pieces of its delta.

    They are fixed by `root`, the tensor's name and the delta's own content, so it does not matter which place
    among the models a delta has, and equal deltas are dropped alike.
    """

    def drawn(model: int) -> Iterator[Tensor]:
        content = blake3()
        for piece in pieces.of(model):
            content.update(piece.to("cpu", torch.float32).numpy().data.cast("B"))
        generator = torch_generator(root, "drop", name, content.hexdigest())
        for piece in pieces.of(model):
            yield torch.rand(piece.shape, generator=generator).to(piece.device)

    return [drawn(k) for k in range(len(pieces))]


def norm_ratios(pieces: Pieces, prune: Callable[[list[Tensor]], list[Tensor]]) -> list[float]:
    """Return for each model Σ|τ| / Σ|prune(τ)| over all pieces of its delta; 1 where one of the sums is below 1e-7."""
    before, after = [0.0] * len(pieces), [0.0] * len(pieces)
    for deltas in pieces:
        for k, delta in enumerate(deltas):
            before[k] += float(delta.abs().sum())
        for k, left in enumerate(prune(deltas)):
            after[k] += float(left.abs().sum())
    return [b / a if min(a, b) >= 1e-7 else 1.0 for b, a in zip(before, after)]


def dropped(
    deltas: Sequence[Tensor], drawn: Sequence[Iterator[Tensor]], keep: Sequence[float | Tensor]
) -> list[Tensor]:
    """Return the pieces of deltas with each element kept with its model's probability `keep` and zero otherwise, by
    what the models' draws give next; the deltas are written to."""
    return [delta.mul_(next(draw) < limit) for delta, draw, limit in zip(deltas, drawn, keep)]
