"""Merging one tensor at a time: lazily merged weights, wide sums, and the base of deltas.

A method takes tensors whole (`combine_tensors`), or, where it works element by element, in pieces
(`combine_elements`), which costs less memory and time. Either returns `MergedWeights`: a tensor is merged when it is
asked for, so that the writer of a file holds a single one.

A task vector (delta) is τ_k = θ_k − θ_base. Own's counts among them, first, as its mixing weight does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from dimat.errors import MergeError
from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import Pieces, PlanPieces, accumulator
from dimat.merge.weight_views import WeightsView

MergeTensor = Callable[[str, Tensor, list[Tensor]], Tensor]
"""(name, own, peers) → merged, all of one shape."""


class MergedWeights(WeightsView):
    """Own's tensors merged with the peers': each access merges one tensor, and nothing is kept.

    `merge` gets tensors in the types that they have, and gives the same result whenever it is asked. Integer, boolean
    and empty tensors are own's; with `grows`, an empty one is merged where a peer's is not (LoRA factors of rank 0).
    Only one tensor of each model is in memory at a time.
    """

    def __init__(self, own: Weights, peers: Sequence[Weights], merge: MergeTensor, *, grows: bool = False) -> None:
        super().__init__(own)
        self._grows = grows
        self._own = own
        self._peers = peers
        self._merge = merge

    def __getitem__(self, name: str) -> Tensor:
        own = self._own[name].detach()
        if not (own.is_floating_point() or own.is_complex()) or not (own.numel() or self._grows):
            return own.clone()
        others = [peer[name].detach() for peer in self._peers]
        if not own.numel() and not any(other.numel() for other in others):
            return own.clone()
        return self._merge(name, own, others)


def taking_part(peers: Sequence[Weights], weights: Sequence[float]) -> tuple[list[Weights], list[float]]:
    """Return the peers whose weight is not 0, and the mixing weights of own (first, even if it is 0) and of them."""
    chosen = [(peer, weight) for peer, weight in zip(peers, weights[1:]) if weight]
    return [peer for peer, _ in chosen], [weights[0], *(weight for _, weight in chosen)]


def combine_tensors(
    own: Weights, peers: Sequence[Weights], merge: MergeTensor, *, grows: bool = False
) -> MergedWeights:
    """Return own's tensors merged with the peers', each whole in the accumulating type on own's device; the results
    are in own's types. `grows`: own's empty tensors are merged where a peer's are not."""

    def one(name: str, tensor: Tensor, peer_tensors: list[Tensor]) -> Tensor:
        start = tensor.to(accumulator(tensor))
        others = [peer.to(device=start.device, dtype=start.dtype) for peer in peer_tensors]
        return merge(name, start, others).to(tensor.dtype)

    return MergedWeights(own, peers, one, grows=grows)


def combine_elements(own: Weights, peers: Sequence[Weights], plan: PlanPieces, with_own: bool = True) -> MergedWeights:
    """Return own's tensors merged with the peers' in pieces, merge = plan(name, values of own and peers), complex
    ones as two reals each. `with_own`: own's values are among those merged."""

    def one(name: str, tensor: Tensor, others: list[Tensor]) -> Tensor:
        pieces = Pieces([tensor, *others] if with_own else others, tensor)
        return pieces.merged(plan(name, pieces))

    return MergedWeights(own, peers, one)


def needs_base(base: Weights | None, method: str) -> Weights:
    """Return the base; MergeError, saying what to do, where there is none."""
    if base is None:
        raise MergeError(
            f"combine method {method!r} takes task vectors from a base, and there is none: give merge.base or base="
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
