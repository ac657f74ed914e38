"""A tensor in 8-bit integers: each block of `BLOCK` elements has its own scale.

scale = max|v| / 127, value = v / scale rounded to the nearest (half to even), decoded value · scale; no element is off
by more than half a scale. Decoding is one conversion, one product and, of a delta, one sum in float32 for each element:
operations whose result IEEE 754 defines to the last bit, so it is the same on any machine, with any number of threads.
(torch.set_flush_denormal breaks that for numbers below 1.2e-38, as it does elsewhere.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256
LARGEST = 2.0**126
"""A tensor with a larger number is not quantised, so that nothing overflows here or at the reader."""
LARGEST_SCALE = 2.0**120
"""127 · scale and a little more stays finite; honest scales are smaller, at most LARGEST / 127."""
_SMALLEST_SCALE = 2.0**-126  # the smallest normal number: smaller ones are too coarse to divide by
_PIECE = (
    2**17
)  # elements worked on at a time, a multiple of BLOCK: what is passed over several times stays in the cache


@dataclass(frozen=True, slots=True)
class Quantised:
    """`values` (int8, of the tensor's shape) and `scales` (float32, one per block) decode to `decoded`; `left` is the
    rounding error, None for a delta."""

    values: Tensor
    scales: Tensor
    decoded: Tensor
    left: Tensor | None


def blocks_of(elements: int) -> int:
    """Return the number of blocks, and so of scales, in a tensor."""
    return -(-elements // BLOCK)


def quantise(weights: Tensor, *, residual: Tensor | None = None, after: Tensor | None = None) -> Quantised | None:
    """Quantise weights + residual, or the difference of weights from `after`; all float32 of one shape, on the CPU,
    `weights` at most `LARGEST`. None if a number is larger than `LARGEST`, or NaN."""
    count = weights.numel()
    flat = weights.reshape(-1)
    values = torch.empty(count, dtype=torch.int8)
    scales = torch.empty(blocks_of(count))
    decoded = torch.empty(count)
    left = torch.empty(count if after is None else min(count, _PIECE))
    for elements, blocks, width in pieces(count):
        own = flat[elements]
        rest = left[elements] if after is None else left[: len(own)]
        if after is not None:
            torch.sub(own, after.reshape(-1)[elements], out=rest)
        elif residual is not None:
            torch.add(own, residual.reshape(-1)[elements], out=rest)
        else:
            rest.copy_(own)
        out = decoded[elements]
        rows, table = rest.view(-1, width), out.view(-1, width)
        largest = torch.abs(rows, out=table).amax(1)
        if not bool((largest <= LARGEST).all()):
            return None
        scale = (largest / 127).clamp_min_(_SMALLEST_SCALE)
        values[elements] = torch.div(rows, scale[:, None], out=table).round_().view(-1)
        scales[blocks] = torch.where(largest > 0, scale, 0.0)
        _restore(values[elements], scales[blocks], width, out)
        if after is None:
            rest.sub_(out)
        else:
            out.add_(after.reshape(-1)[elements])
    shape = weights.shape
    return Quantised(values.view(shape), scales, decoded.view(shape), left.view(shape) if after is None else None)


def restore(values: Tensor, scales: Tensor, after: Tensor | None = None) -> Tensor:
    """Decode a result of `quantise`; `scales` has as many elements as `blocks_of` says."""
    flat = values.reshape(-1)
    decoded = torch.empty(len(flat))
    for elements, blocks, width in pieces(len(flat)):
        out = decoded[elements]
        _restore(flat[elements], scales[blocks], width, out)
        if after is not None:
            out.add_(after.reshape(-1)[elements])
    return decoded.view(values.shape)


def _restore(values: Tensor, scales: Tensor, width: int, out: Tensor) -> None:
    """Write value · scale of rows of `width` elements; each operation is rounded separately, never fused."""
    out.copy_(values).view(-1, width).mul_(scales[:, None])


def pieces(count: int) -> Iterator[tuple[slice, slice, int]]:
    """Yield (elements, blocks, elements per block): pieces of whole blocks, then the short block at the end. Work in
    such pieces takes no memory beside its result, and stays in the cache."""
    whole = count // BLOCK * BLOCK
    for start in range(0, whole, _PIECE):
        end = min(start + _PIECE, whole)
        yield slice(start, end), slice(start // BLOCK, end // BLOCK), BLOCK
    if whole < count:
        yield slice(whole, count), slice(whole // BLOCK, None), count - whole
