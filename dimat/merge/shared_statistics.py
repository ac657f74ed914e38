"""Statistics sent with weights: Fisher diagonals, Gram matrices, statistics by class.

In a snapshot they are tensors `aux.…`, in `MergeContext.aux` a mapping per agent of the names without `aux.`
(own's under `OWN`): `fisher.<tensor>` has the tensor's shape, `gram.<tensor>` (in, in) for a weight (out, in); those by
class are in `class_statistics.py`. A combine or repair method that asks for `aux` gets them in the order of the
weights: own, peers, in own's basis. The function that computes them is registered with the method:
`combine_registry.register("fisher", statistics=empirical_fisher)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dimat.errors import MergeError, PeerError, nearest
from dimat.merge.class_statistics import FEATURE_AXIS, check_classes, is_finite
from dimat.merge.stages import Inputs, Permutations, Weights
from dimat.merge.weight_views import PermutedWeights, RenamedWeights, axes_by_name, stacks_of
from dimat.registry import Bound, keywords
from dimat.symmetry.spec import AxisRef, Stack, SymmetrySpec

OWN = ""
"""Name under which an agent's own statistics stand beside its peers'; no agent can be called so."""

AUX = "aux."
FISHER = "fisher."
GRAM = "gram."
GRAM_TOLERANCE = 1e-3
"""Error that sums in single precision may have, as a share of the product of two units' root mean squares."""

Examples = Iterable[tuple[Inputs, Tensor]]
"""Batches of (the model's arguments, targets), examples along dim 0; read once."""


class TakeStatistics(Protocol):
    """Computes the statistics of a model at its own weights: {"fisher.<tensor>", "gram.<tensor>", …: tensor}.

    `loss`: (output, targets) of a batch → its mean loss. The model is left as it was, and so are global draws.
    """

    def __call__(self, model: nn.Module, examples: Examples, *, loss: Callable[[Any, Tensor], Tensor]) -> Weights: ...


class Statistics(NamedTuple):
    """Statistics that merges need. `asked_by`: the setting that needs them, as text; `take` computes them."""

    asked_by: str
    take: TakeStatistics


def statistics_of(key: str, method: Bound[Any]) -> Statistics | None:
    """Return the statistics that a method needs with its options; None if it needs none. `key`: its setting."""
    take: Callable[..., Weights] | None = method.traits["statistics"]
    if take is None:
        return None
    options = {name: value for name, value in method.settings.items() if name in keywords(take)}
    return Statistics(f"{key} = {method.name!r}", partial(take, **options))


def beside(weights: Weights, aux: Weights) -> dict[str, Tensor]:
    """Return a snapshot's tensors: weights, and statistics under `aux.…`; raises MergeError if a name is taken."""
    extras = {AUX + name: tensor for name, tensor in aux.items()}
    for name in extras.keys() & weights.keys():
        raise MergeError(f"the model's tensor {name!r} has the name of a statistic; rename its module")
    return {**weights, **extras}


def apart(snapshot: Weights, own: Weights, beginnings: tuple[str, ...] = ("",)) -> tuple[Weights, Weights]:
    """Return a snapshot's weights, and the tensors beside them: those named `aux.…`, with one of these `beginnings`
    after that, unless the agent's own model has a tensor of that name. Nothing is read yet."""
    named = tuple(AUX + beginning for beginning in beginnings)
    aux = {name.removeprefix(AUX): name for name in snapshot if name.startswith(named) and name not in own}
    taken = set(aux.values())
    weights = {name: name for name in snapshot if name not in taken}
    return RenamedWeights(snapshot, weights), RenamedWeights(snapshot, aux)


def in_order(
    aux: Mapping[str, Weights] | None,
    names: Sequence[str],
    permutations: Mapping[str, Permutations],
    spec: SymmetrySpec | None,
) -> list[Weights] | None:
    """Return the statistics of own and of these peers, in own's basis; an empty mapping for a peer that sent none.

    `permutations`: by name of the aligned peers; their statistics are permuted like their weights.
    """
    if aux is None:
        return None
    listed: list[Weights] = [aux.get(OWN, {})]
    for name in names:
        theirs, moves = aux.get(name, {}), permutations.get(name)
        listed.append(permuted(theirs, spec, moves) if moves and spec is not None else theirs)
    return listed


def permuted(aux: Weights, spec: SymmetrySpec, permutations: Permutations) -> Weights:
    """Return statistics, permuted like the weights that these permutations move."""
    return PermutedWeights(aux, _spec_for(aux, spec), permutations)


def check_statistics(name: str, aux: Weights, own: Weights, expected: Weights | None, most_examples: int) -> None:
    """Check the statistics that a peer sent with its weights; PeerError names the peer and the tensor.

    `expected`: own's statistics if the merge needs them; then the peer must have sent the same ones, no more and
    no fewer. Fisher diagonals must have the shape of our tensor, Gram matrices that of its inputs; both must be finite,
    with no negative value (on the diagonal), and a Gram matrix symmetric, with G[i, j]² ≤ G[i, i] G[j, j]. Those by
    class are checked by `check_classes`, with `most_examples`. Where none are expected, other names are left alone.
    """
    if expected and not aux:
        raise PeerError(
            f"{name}: sent no statistics ({next(iter(expected))!r} and others); agents must merge by the same "
            "merge.combine, merge.repair and merge.head"
        )
    for key in expected or ():
        if key not in aux:
            raise PeerError(f"{name}: statistic {key!r} is missing{nearest(key, aux)}")
    for key in aux:
        if expected and key not in expected:
            raise PeerError(f"{name}: statistic {key!r} is not one of this agent's{nearest(key, expected)}")
        if not key.startswith((FISHER, GRAM)):
            continue
        target = key.partition(".")[2]
        if target not in own:
            raise PeerError(f"{name}: statistic {key!r} belongs to no tensor of the model")
        found, ours = aux[key], own[target].shape
        shape = ours if key.startswith(FISHER) else torch.Size([ours[1], ours[1]] if len(ours) == 2 else [])
        if found.shape != shape:
            raise PeerError(f"{name}: statistic {key!r} is {[*found.shape]}, expected {[*shape]}")
        if not is_finite(found) or bool(((found if key.startswith(FISHER) else found.diagonal()) < 0).any()):
            raise PeerError(f"{name}: statistic {key!r} holds values that are negative or not finite")
        if key.startswith(GRAM) and not _is_gram(found):
            raise PeerError(
                f"{name}: statistic {key!r} is not a Gram matrix: it is not symmetric, or too large off its diagonal"
            )

    check_classes(name, aux, own, expected or {}, most_examples)


def _is_gram(found: Tensor) -> bool:
    wide = found.cpu().double()
    scale = wide.diagonal().sqrt()
    bound = torch.outer(scale, scale) * GRAM_TOLERANCE + torch.finfo(torch.float32).tiny
    return bool(((wide - wide.mT).abs() <= bound).all() and (wide.abs() <= bound + torch.outer(scale, scale)).all())


def statistic(aux: Sequence[Weights], key: str, device: torch.device) -> list[Tensor] | None:
    """Return one statistic of own and peers on a device, each in its own type; None if nobody has it.

    Raises MergeError if only some have it, naming the first without.
    """
    lacking = [k for k, theirs in enumerate(aux) if key not in theirs]
    if len(lacking) == len(aux):
        return None
    if lacking:
        who = f"peer {lacking[0] - 1} sent" if lacking[0] else "own statistics have"
        raise MergeError(f"{who} no {key!r}; all agents that merge must compute the same statistics")
    return [theirs[key].detach().to(device) for theirs in aux]


def needs_aux(aux: Sequence[Weights] | None, prefix: str, method: str, how: str) -> Sequence[Weights]:
    """Return the statistics; raises MergeError, saying `how` to get them, if own or a peer has none of this prefix."""
    for k, theirs in enumerate(aux or [{}]):
        if not any(key.startswith(prefix) for key in theirs):
            who = f"peer {k - 1}" if k else "own weights"
            raise MergeError(f"combine method {method!r} needs {prefix}* statistics, {who} came without: see {how}")
    return aux or []


def _spec_for(aux: Weights, spec: SymmetrySpec) -> SymmetrySpec:
    """Return a spec whose axes are those of the statistics: a Gram matrix moves as its weight's inputs, twice, features
    of classes as they do."""
    by_name = axes_by_name(spec)
    axes: list[AxisRef] = []
    for key in aux:
        moving = by_name.get(key.partition(".")[2], [])
        if key.startswith(FISHER):
            axes += [replace(axis, tensor=key) for axis in moving]
        elif key.startswith(GRAM):
            axes += [replace(axis, tensor=key, dim=dim) for axis in moving if axis.dim == 1 for dim in (0, 1)]
        for kind, dim in FEATURE_AXIS.items():
            if key.startswith(kind):
                axes += [replace(axis, tensor=key, dim=dim) for axis in moving if axis.dim == 1]
    stacks: list[Stack] = []
    for kind in (FISHER, GRAM):
        for stack in stacks_of(kind, aux, spec):
            stacks.append(stack)
            for axis in by_name[stack.tensor.removeprefix(kind)]:
                if kind == FISHER or not axis.dim:
                    axes.append(replace(axis, tensor=stack.tensor))
                elif axis.dim == 2:  # inputs of the list's matrices
                    axes += [replace(axis, tensor=stack.tensor, dim=dim) for dim in (1, 2)]
    apart = {name for stack in stacks for name in stack.sources}
    return replace(spec, axes=tuple(axis for axis in axes if axis.tensor not in apart), tied=(), stacks=tuple(stacks))
