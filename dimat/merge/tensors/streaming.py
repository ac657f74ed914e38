"""What combine methods share: going through tensors one at a time, in a type that sums do not suffer in; task vectors.

A method takes tensors whole (`combine_tensors`), or, where it works element by element, in pieces
(`combine_elements`), which costs less memory and time.

A task vector (delta) is τ_k = θ_k − θ_base. Own's counts among them, first, as its mixing weight does.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from dimat.errors import MergeError
from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import Pieces, PlanPieces, accumulator

MergeTensor = Callable[[str, Tensor, list[Tensor]], Tensor]
"""(name, own, peers) → merged, all of one shape and in the accumulating type."""

Receiver = Callable[[str, Tensor], None]
"""Takes a merged tensor as soon as it is there."""

Keeper = Callable[[Tensor], Tensor]
"""Puts a tensor away, out of memory, and returns what it can be read from again."""

_receiver: ContextVar[Receiver | None] = ContextVar("receiver", default=None)
_keeper: ContextVar[Keeper | None] = ContextVar("keeper", default=None)


@contextmanager
def handing_on(receive: Receiver, keep: Keeper | None = None) -> Generator[None]:
    """Inside, `each_tensor` hands each merged tensor to `receive` and keeps none, so that a merge of files needs
    memory for single tensors only. What a combine method still returns is what it made without `each_tensor`. `keep`
    puts away what a method needs of all tensors at once (see `kept`)."""
    tokens = _receiver.set(receive), _keeper.set(keep)
    try:
        yield
    finally:
        _receiver.reset(tokens[0])
        _keeper.reset(tokens[1])


def kept(tensor: Tensor) -> Tensor:
    """Return a tensor to be used when the whole model has been gone through: on disk where whoever merges files sees to
    that, else as it is."""
    keep = _keeper.get()
    return tensor if keep is None else keep(tensor)


def each_tensor(own: Weights, peers: Sequence[Weights], merge: MergeTensor) -> dict[str, Tensor]:
    """Return own's tensors merged with the peers' one after the other; `merge` gets each in the type it has.

    Only one tensor of each peer is in memory at a time. Integer and boolean tensors are own's. It is the last thing
    that a method does, as its result may be handed on (see `handing_on`) instead of returned.
    """
    merged: dict[str, Tensor] = {}
    receive = _receiver.get() or merged.__setitem__
    for name, tensor in own.items():
        own_tensor = tensor.detach()
        if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
            receive(name, own_tensor.clone())
            continue
        others = [peer[name].detach() for peer in peers]
        receive(name, merge(name, own_tensor, others))
        del own_tensor, tensor, others  # before the next ones are read
    return merged


def combine_tensors(own: Weights, peers: Sequence[Weights], merge: MergeTensor) -> dict[str, Tensor]:
    """Return own's tensors merged with the peers', each whole in the accumulating type on own's device; the results
    are in own's types. Otherwise as `each_tensor`."""

    def one(name: str, tensor: Tensor, peer_tensors: list[Tensor]) -> Tensor:
        start = tensor.to(accumulator(tensor))
        others = [peer.to(device=start.device, dtype=start.dtype) for peer in peer_tensors]
        return merge(name, start, others).to(tensor.dtype)

    return each_tensor(own, peers, one)


def combine_elements(
    own: Weights, peers: Sequence[Weights], plan: PlanPieces, with_own: bool = True
) -> dict[str, Tensor]:
    """Return own's tensors merged with the peers' in pieces, merge = plan(name, values of own and peers), complex
    ones as two reals each. Otherwise as `each_tensor`. `with_own`: own's values are among those merged."""

    def one(name: str, tensor: Tensor, others: list[Tensor]) -> Tensor:
        pieces = Pieces([tensor, *others] if with_own else others, tensor)
        return pieces.merged(plan(name, pieces))

    return each_tensor(own, peers, one)


def needs_base(base: Weights | None, method: str) -> Weights:
    """Return the base; MergeError, saying what to do, where there is none."""
    if base is None:
        raise MergeError(
            f"combine method {method!r} takes deltas from a base, and there is none: give merge.base or base="
        )
    return base


def base_tensor(name: str, own: Tensor, base: Weights) -> Tensor:
    """Return a tensor of the base on own's device, in its own type; MergeError where it is none of own's shape."""
    if name not in base:
        raise MergeError(f"the base has no tensor {name!r}; it must be of the same architecture")
    start = base[name].detach().to(own.device)
    if start.shape != own.shape:
        raise MergeError(f"tensor {name!r} is {[*own.shape]}, in the base {[*start.shape]}")
    return start
