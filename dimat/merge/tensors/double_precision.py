"""Sums, differences and distances of tensors in double precision, some elements at a time."""

from __future__ import annotations

from collections.abc import Callable
from math import hypot

import torch
from torch import Tensor

from dimat.merge.tensors.pieces import PIECE


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in double precision."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def difference(one: Tensor, other: Tensor) -> Tensor:
    """Return one − other in double precision."""
    return wide(one) - wide(other)


def total_of(one: Tensor, other: Tensor) -> Tensor:
    """Return one + other in double precision."""
    return wide(one) + wide(other)


def by_parts(out: Tensor, function: Callable[[Tensor, Tensor], Tensor], one: Tensor, other: Tensor) -> Tensor:
    """Fill `out`, a dense tensor, by a function of each element; on the CPU some elements at a time, so that what is in
    double precision in between stays in the processor's cache."""
    if out.device.type != "cpu":
        return out.copy_(function(one, other))
    for part, *parts in zip(*(tensor.reshape(-1).split(PIECE) for tensor in (out, one, other))):
        part.copy_(function(*parts))
    return out


def distance(one: Tensor, other: Tensor) -> float:
    """Return the norm of a difference in double precision."""
    size = PIECE if one.device.type == "cpu" else max(one.numel(), 1)
    parts = zip(one.reshape(-1).split(size), other.reshape(-1).split(size))
    return hypot(*(float(torch.linalg.vector_norm(difference(*pair))) for pair in parts))
