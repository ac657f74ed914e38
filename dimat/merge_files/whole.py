"""Merges files of models that are run: align, combine, repair, with all models in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dimat.merge.align.none import none as no_alignment
from dimat.merge.context import MergeContext
from dimat.merge.matching.assignment import moved_share
from dimat.merge.registry import align_registry, repair_registry
from dimat.merge.settled import merge_checked
from dimat.merge.shared_statistics import OWN, in_order
from dimat.merge.stages import Permutations, Weights
from dimat.merge.weight_views import PermutedWeights
from dimat.merge_files.architecture import Network
from dimat.merge_files.recipe import Recipe, TensorGroup


@dataclass(frozen=True)
class WholeMerge:
    """Merged tensors; `moved`: for each peer, the share of units that moved, None if it was not aligned; `notes`: for
    the user."""

    weights: dict[str, Tensor]
    moved: tuple[float | None, ...]
    notes: tuple[str, ...] = ()


def merge_whole(
    recipe: Recipe,
    network: Network,
    models: Sequence[Weights],
    base: Weights | None,
    statistics: Sequence[Weights] | None,
    parts: Sequence[TensorGroup],
    device: torch.device,
) -> WholeMerge:
    """Bring the peers' units into the first model's order, combine, repair.

    Everything is merged in the network's type. A model without a weight anywhere is ignored, and if only the first one
    has weight, its tensors are returned unchanged. Deltas are taken from the base as it is: it must be in the first
    model's order of units. Raises MergeError if a stage cannot do its work.
    """
    own = _loaded(models[0], network, device)
    taking = [any(part.mixing[k] for part in parts) for k in range(1, len(models))]
    if not any(taking):
        return WholeMerge(own, (None,) * len(taking))
    peers = [_loaded(peer, network, device) if used else peer for peer, used in zip(models[1:], taking)]
    start = None if base is None else _loaded(base, network, device)
    context = MergeContext(
        network.model,
        network.spec,
        network.data,
        base=start,
        generator=torch.Generator().manual_seed(recipe.seed),
    )
    moves, notes = _aligned(recipe, own, peers, taking, context)
    views = [PermutedWeights(p, network.spec, m) if m and network.spec else p for p, m in zip(peers, moves)]
    names = [f"model {k} ({model.path})" for k, model in enumerate(recipe.models[1:], 2)]
    given = None if statistics is None else dict(zip([OWN, *names], statistics))
    aux = in_order(given, names, dict(zip(names, moves)), network.spec)
    result: dict[str, Tensor] = {}
    offered = context.offered() | {"aux": aux, "names": names}
    for part in parts:

        def method(own: Weights, peers: Sequence[Weights], base: Weights | None, part: TensorGroup = part) -> Weights:
            return part.method(own, peers, part.mixing, **(offered | {"base": base}))

        ours, theirs = _only(own, part.names), [_only(view, part.names) for view in views]
        result |= merge_checked(
            method, ours, theirs, part.mixing, start, names, network.model, finite=not recipe.keep_not_finite
        )
    offered |= {"models": [own, *views], "mixing": recipe.mixing}
    repaired = repair_registry.call(recipe.repair.name, recipe.repair.options, result, **offered)
    moved = tuple(moved_share(m) if m else None for m in moves)
    return WholeMerge(repaired.weights, moved, (*notes, *repaired.notes))


def _aligned(
    recipe: Recipe, own: Weights, peers: Sequence[Weights], taking: Sequence[bool], context: MergeContext
) -> tuple[list[Permutations], tuple[str, ...]]:
    """Return the permutations of each peer, none for those without a weight."""
    moves: list[Permutations] = [{} for _ in peers]
    if context.spec is None or align_registry.get(recipe.align.name) is no_alignment:
        return moves, ()
    if not context.spec.groups:
        return moves, (*context.spec.warnings, "no symmetry groups are known: merged without alignment")
    aligned = align_registry.call(
        recipe.align.name,
        recipe.align.options,
        own,
        [peer for peer, used in zip(peers, taking) if used],
        **context.offered(),
    )
    found = iter(aligned.permutations)
    return [next(found) if used else {} for used in taking], (*context.spec.warnings, *aligned.notes)


def _loaded(weights: Weights, network: Network, device: torch.device) -> dict[str, Tensor]:
    whole = network.complete(weights)
    return {name: t.to(device, network.dtype if t.is_floating_point() else None) for name, t in whole.items()}


def _only(weights: Weights, names: Sequence[str]) -> dict[str, Tensor]:
    return {name: weights[name] for name in names}
