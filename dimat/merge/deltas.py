"""What combine methods share: going through tensors one at a time, in a type that sums do not suffer in; task vectors.

A task vector (delta) is τ_k = θ_k − θ_base. Own's counts among them, first, as its mixing weight does.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from dimat.errors import MergeError
from dimat.merge.stages import Weights

MergeTensor = Callable[[str, Tensor, list[Tensor]], Tensor]
"""(name, own, peers) → merged, all of one shape and in the accumulating type."""

Receiver = Callable[[str, Tensor], None]
"""Takes a merged tensor as soon as it is there."""

_receiver: ContextVar[Receiver | None] = ContextVar("receiver", default=None)


def accumulator(tensor: Tensor) -> torch.dtype:
    """Return the type in which tensors like this are summed: float64 for float32 and above, float32 for half types."""
    if tensor.is_complex():
        return torch.complex128
    if tensor.dtype in (torch.float32, torch.float64) and tensor.device.type != "mps":  # MPS has no float64
        return torch.float64
    return torch.float32


@contextmanager
def handing_on(receive: Receiver) -> Generator[None]:
    """Inside, `combine_tensors` hands each merged tensor to `receive` and keeps none, so that a merge of files needs
    memory for single tensors only. What a combine method still returns is what it made without `combine_tensors`."""
    token = _receiver.set(receive)
    try:
        yield
    finally:
        _receiver.reset(token)


def combine_tensors(own: Weights, peers: Sequence[Weights], merge: MergeTensor) -> dict[str, Tensor]:
    """Return own's tensors merged with the peers' one after the other, in own's types and on own's devices.

    Only one tensor of each peer is in memory at a time. Integer and boolean tensors are own's. It is the last thing
    that a method does, as its result may be handed on (see `handing_on`) instead of returned.
    """
    merged: dict[str, Tensor] = {}
    receive = _receiver.get() or merged.__setitem__
    for name, tensor in own.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            receive(name, tensor.detach().clone())
            continue
        start = tensor.detach().to(accumulator(tensor))
        others = [peer[name].detach().to(device=start.device, dtype=start.dtype) for peer in peers]
        receive(name, merge(name, start, others).to(tensor.dtype))
        del start, others  # before the next ones are read
    return merged


def needs_base(base: Weights | None, method: str) -> Weights:
    """Return the base; MergeError, saying what to do, where there is none."""
    if base is None:
        raise MergeError(
            f"combine method {method!r} takes deltas from a base, and there is none: give merge.base or base="
        )
    return base


def task_vectors(name: str, own: Tensor, peers: Sequence[Tensor], base: Weights) -> tuple[Tensor, list[Tensor]]:
    """Return a tensor of the base, and what own and the peers add to it, own first; MergeError where shapes differ."""
    if name not in base:
        raise MergeError(f"the base has no tensor {name!r}; it must be of the same architecture")
    start = base[name].detach().to(device=own.device, dtype=own.dtype)
    if start.shape != own.shape:
        raise MergeError(f"tensor {name!r} is {[*own.shape]}, in the base {[*start.shape]}")
    return start, [tensor - start for tensor in (own, *peers)]
