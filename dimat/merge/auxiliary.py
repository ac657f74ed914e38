"""Statistics that travel with weights and that some combine methods rest on: Fisher diagonals, Gram matrices.

In a snapshot they are tensors `aux.…`, in `MergeContext.aux` a mapping per agent of the names without `aux.`
(own's under `OWN`): `fisher.<tensor>` has the tensor's shape, `gram.<tensor>` (in, in) for a weight (out, in).
A combine method that asks for `aux` gets them as it gets weights: in the order own, peers, in own's basis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dimat.errors import MergeError, PeerError
from dimat.merge.stages import Permutations, Weights
from dimat.merge.weights import PermutedWeights, axes_by_name
from dimat.symmetry.spec import AxisRef, SymmetrySpec

OWN = ""
"""Name under which an agent's own statistics stand beside its peers'; no agent can be called so."""

FISHER = "fisher."
GRAM = "gram."


def in_order(
    aux: Mapping[str, Weights] | None,
    names: Sequence[str],
    permutations: Mapping[str, Permutations],
    spec: SymmetrySpec | None,
) -> list[Weights] | None:
    """Return the statistics of own and of these peers, in own's basis; an empty mapping for who sent none.

    `permutations`: by name of the peers that were aligned; their statistics move as their weights do.
    """
    if aux is None:
        return None
    listed: list[Weights] = [aux.get(OWN, {})]
    for name in names:
        theirs, moves = aux.get(name, {}), permutations.get(name)
        if moves and spec is not None:
            theirs = PermutedWeights(theirs, _spec_for(theirs, spec), moves)
        listed.append(theirs)
    return listed


def check_statistics(name: str, aux: Weights, own: Weights) -> None:
    """Check what a peer sent beside its weights; PeerError names the peer and the tensor.

    Fisher diagonals must have the shape of our tensor, Gram matrices that of its inputs; both must be finite, with
    no negative value (on the diagonal). Other names are of no use to any method here and are left alone.
    """
    for key in aux:
        if not key.startswith((FISHER, GRAM)):
            continue
        target = key.partition(".")[2]
        if target not in own:
            raise PeerError(f"{name}: statistic {key!r} is of no tensor of our model")
        found, ours = aux[key], own[target].shape
        expected = ours if key.startswith(FISHER) else torch.Size([ours[1], ours[1]] if len(ours) == 2 else [])
        if found.shape != expected:
            raise PeerError(f"{name}: statistic {key!r} is {[*found.shape]}, expected {[*expected]}")
        values = found if key.startswith(FISHER) else found.diagonal()
        if not found.is_floating_point() or not found.isfinite().all() or (values < 0).any():
            raise PeerError(f"{name}: statistic {key!r} holds values that are negative or not finite")


def statistic(aux: Sequence[Weights], key: str, like: Tensor) -> list[Tensor] | None:
    """Return one statistic of own and peers on the device and in the type of `like`; None where nobody has it.

    Raises MergeError where only some have it, naming the first who has not.
    """
    lacking = [k for k, theirs in enumerate(aux) if key not in theirs]
    if len(lacking) == len(aux):
        return None
    if lacking:
        who = f"peer {lacking[0] - 1} sent" if lacking[0] else "own statistics have"
        raise MergeError(f"{who} no {key!r}; all agents that merge must compute the same statistics")
    return [theirs[key].detach().to(device=like.device, dtype=like.dtype) for theirs in aux]


def needs_aux(aux: Sequence[Weights] | None, prefix: str, method: str, how: str) -> Sequence[Weights]:
    """Return the statistics; MergeError, saying `how` to get them, where own or a peer has none with this prefix."""
    for k, theirs in enumerate(aux or [{}]):
        if not any(key.startswith(prefix) for key in theirs):
            who = f"peer {k - 1}" if k else "own weights"
            raise MergeError(f"combine method {method!r} needs {prefix}* statistics, {who} came without: see {how}")
    return aux or []


def _spec_for(aux: Weights, spec: SymmetrySpec) -> SymmetrySpec:
    """Return a spec whose axes are those of the statistics: a Gram matrix moves as its weight's inputs, twice."""
    by_name = axes_by_name(spec)
    axes: list[AxisRef] = []
    for key in aux:
        moving = by_name.get(key.partition(".")[2], [])
        if key.startswith(FISHER):
            axes += [replace(axis, tensor=key) for axis in moving]
        elif key.startswith(GRAM):
            axes += [replace(axis, tensor=key, dim=dim) for axis in moving if axis.dim == 1 for dim in (0, 1)]
    return replace(spec, axes=tuple(axes), tied=())
