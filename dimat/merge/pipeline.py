"""The merge pipeline: screen → align → combine → step → bound → repair → check → accept.

    plan = plan_merge(MergeConfig(method="dimat"))
    outcome = merge(own, 0.5, [Peer("lab-b", weights, 0.5)], plan, MergeContext(model, spec, data))

No argument is changed: not the model, its mode and BatchNorm momentum, nor any weights, nor the global random state. A
peer that cannot be trusted is refused as a whole, and its mixing weight goes to this agent. Entries other than
parameters are treated by their nature (`natures.py`), whatever the combine method does. If configured, a merge goes
only a part of the way, in all tensors or in some (`outer.py`). If the size of the weights after the agent's own
training is known (`growth.py`), no merge makes them larger than a multiple of that, and a peer with unusually large
weights is left out if it makes the merge worse. A merge that is not finite is not kept, unless the plan says so, and a
note reports it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from math import isclose, isfinite, isnan
from numbers import Real
from typing import Any, cast

from torch import Tensor

from dimat.errors import DimatError, MergeError
from dimat.events import WARNING
from dimat.merge.accept.no_worse import between
from dimat.merge.context import MergeContext
from dimat.merge.head_rows import rows_by_class
from dimat.merge.matching.assignment import moved_share
from dimat.merge.natures import Natures, natures_of
from dimat.merge.outer import held_back
from dimat.merge.plan import MergePlan
from dimat.merge.screen import check_usual, norm_of, screen
from dimat.merge.settled import Shield, not_finite
from dimat.merge.shared_statistics import OWN, check_statistics, in_order
from dimat.merge.stages import Accepted, Aligned, Permutations, Repaired, StageTimer, Weights
from dimat.merge.ties import check_own_ties, check_ties, surely_tied, under_names
from dimat.merge.weight_views import PermutedWeights

MIXING_TOLERANCE = 1e-6
"""Mixing weights sum to 1 within this."""

LARGE = 3.0
"""A peer whose weights exceed the norms after the agent's own training by this factor must not make the merge worse."""

WORSE = 0.02
"""A merge is worse than another if its score is lower by this, or by this share of a score above 1."""

NOT_KEPT = "the merge is not kept, own weights stay"
KEPT = "the merge is kept, since merge.keep_not_finite is set"
"""Ends of notes on a merge that is not finite."""


@dataclass(frozen=True)
class Peer:
    """A neighbour's weights and their mixing weight. `same_basis`: its units are already in this agent's order."""

    name: str
    weights: Weights
    weight: float
    same_basis: bool = False


@dataclass(frozen=True)
class MergeOutcome:
    """The result of a merge. `own_weight` and `mixing`: after refusals, whose weight went to this agent; `permutations`
    and `moved` (share of units that moved) list the peers that were aligned; `accepted`: position of the weights on the
    way from own (0) to merged (1); `doubtful`: a peer in it is unusually large, or the merge had to be limited;
    `cpu_s`: CPU seconds by stage; `images`: examples by stage."""

    weights: dict[str, Tensor]
    own_weight: float
    mixing: dict[str, float]
    refused: dict[str, str] = field(default_factory=dict[str, str])
    permutations: dict[str, Permutations] = field(default_factory=dict[str, Permutations])
    moved: dict[str, float] = field(default_factory=dict[str, float])
    accepted: float = 1.0
    notes: tuple[str, ...] = ()
    doubtful: bool = False
    cpu_s: dict[str, float] = field(default_factory=dict[str, float])
    images: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def changes(self) -> bool:
        """Whether the weights contain any part of a peer's."""
        return self.accepted > 0 and bool(self.mixing)


def merge(
    own: Weights,
    own_weight: float,
    peers: Sequence[Peer],
    plan: MergePlan,
    context: MergeContext,
    *,
    refuse: bool = True,
) -> MergeOutcome:
    """Merge peers' weights into own: θ = repair(outer(own, combine(own, align(peers)))), kept if accepted.

    `own_weight` and the peers' weights are this agent's row of the mixing matrix. Peers of weight 0 are ignored; with
    `own_weight` 1, or no peer left after the screen, own weights are returned bit for bit. `refuse`: a peer that the
    screen rejects is left out and its weight goes to this agent; False raises instead. Raises MergeError for mixing
    weights that are negative or do not sum to 1, own weights that are not finite or not the model's, and stages that
    lack an input; own weights are never changed.
    """
    check_mixing([own_weight, *(peer.weight for peer in peers)])
    clock = StageTimer()
    check_usual(own)
    natures = natures_of(own, context.model)
    tied = surely_tied(own, natures.first, context.model)
    own_norm = _check_own(own, context, natures, plan, tied)
    statistics = context.aux or {}
    expected = statistics.get(OWN) if plan.statistics else None
    refused: dict[str, str] = {}
    kept: list[Peer] = []
    large: dict[str, float] = {}
    for peer in peers:
        try:
            renamed = replace(peer, weights=under_names(peer.weights, own, natures.first))
            factor = screen(own, renamed.weights, peer.name, own_norm, natures, context.reference, **plan.screen)
            check_ties(renamed.weights, peer.name, tied)
            check_statistics(peer.name, statistics.get(peer.name, {}), own, expected, plan.statistics_samples)
            if context.beside is not None:
                context.beside(peer.name)
        except DimatError as error:
            if not refuse:
                raise
            refused[peer.name] = str(error)
        else:
            kept.append(renamed)
            if factor > LARGE and peer.weight > 0:
                large[peer.name] = factor
    clock.lap("screen")
    own_weight += sum(peer.weight for peer in peers if peer.name in refused)

    def attempt(peers: list[Peer], own_weight: float, refused: dict[str, str]) -> MergeOutcome:
        return _merge(own, own_weight, peers, plan, context, natures, clock, refused, refuse=refuse)

    if not large or context.judge is None or not refuse:
        outcome = attempt(kept, own_weight, refused)
        return replace(outcome, doubtful=True) if large else outcome
    state = deepcopy(context.state)
    usual = [peer for peer in kept if peer.name not in large]
    without_large = own_weight + sum(peer.weight for peer in kept if peer.name in large)
    without = attempt(usual, without_large, refused)
    after, context.state = context.state, state
    outcome = attempt(kept, own_weight, refused)
    with_score, without_score = context.judge(outcome.weights), context.judge(without.weights)
    clock.lap("judge")
    bar = without_score - WORSE * max(abs(without_score), 1.0)
    if outcome.accepted and (with_score >= bar or isnan(without_score)):
        return replace(outcome, doubtful=True)
    context.state = after
    scores = f"the merge with it scores {with_score:.3g}, the merge without it {without_score:.3g} (higher is better)"
    told = {
        name: f"{name}: weights up to {factor:.3g} times as large as this agent's own have become in training; {scores}"
        for name, factor in large.items()
    }
    return replace(without, refused=refused | told, cpu_s=clock.seconds)


def _merge(
    own: Weights,
    own_weight: float,
    kept: Sequence[Peer],
    plan: MergePlan,
    context: MergeContext,
    natures: Natures,
    clock: StageTimer,
    refused: dict[str, str],
    *,
    refuse: bool,
) -> MergeOutcome:
    """Merge the peers that the screen has accepted; `own_weight` includes the weight of those that it has not."""
    mixing = {peer.name: peer.weight for peer in kept}
    merging = [peer for peer in kept if peer.weight > 0]
    if not merging:
        return MergeOutcome(_copy(own), own_weight, mixing, refused, cpu_s=clock.seconds)

    foreign = [peer for peer in merging if not peer.same_basis]
    aligned = _align(own, [peer.weights for peer in foreign], plan, context)
    permutations = dict(zip((peer.name for peer in foreign), aligned.permutations))
    views = [_view(peer.weights, permutations.get(peer.name), context) for peer in merging]
    clock.lap("align")
    aux = in_order(context.aux, [peer.name for peer in merging], permutations, context.spec)
    own_first = [own_weight, *(peer.weight for peer in merging)]
    offered = context.offered() | {"aux": aux, "models": [own, *views], "mixing": own_first}
    names = [peer.name for peer in merging]
    shield = Shield.of(own, views, own_first, natures, context.model is not None)
    base = None if context.base is None else under_names(context.base, own, natures.first)
    seen = offered | {"names": names, "base": shield.base(base)}
    together = plan.combine(shield.own, shield.peers, own_first, **seen)
    if plan.head == "rows":
        together = rows_by_class(together, [shield.own, *shield.peers], own_first, aux)
    combined = dict(shield.settle(together))
    _check_shapes(own, combined, plan.combine.name)
    stepped = plan.outer(own, held_back(own, combined, plan.factors(own, natures)), **offered)
    if stepped is not combined:
        combined = dict(shield.settle(stepped))
    fault, share, bounded = not_finite(combined, shield.fixed), 1.0, ""
    if context.reference is not None and not fault:
        renewed = plan.repair.traits["renews"](context.model) if context.model is not None else ()
        share, where = context.reference.without(renewed).share(
            own, combined, own_weight + (1 - own_weight) * plan.most
        )
        if share < 1:
            what = f"tensor {where!r}" if where else "weights"
            bounded = f"the merge makes {what} too large: it went only {share:.3g} of the way"
            combined = dict(shield.settle(between(own, combined, share)))
    clock.lap("combine")
    repaired = Repaired(combined) if fault and not plan.keep_not_finite else plan.repair(combined, **offered)
    clock.lap("repair")
    notes = (*plan.notes, *aligned.notes, *repaired.notes, *((f"{WARNING}{bounded}",) if bounded else ()))
    fault = fault or not_finite(repaired.weights, shield.fixed)
    if fault and plan.keep_not_finite:
        notes = (*notes, f"{WARNING}{fault}: {KEPT}")
    elif fault:
        if not refuse:
            raise MergeError(f"{fault}; own weights are unchanged")
        accepted = Accepted(dict(own), 0.0, (f"{WARNING}{fault}: {NOT_KEPT}",))
        notes = (*notes, *accepted.notes)
        return _outcome(own, own_weight, mixing, refused, permutations, accepted, notes, clock, aligned, repaired)

    def repair_again(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return plan.repair(dict(shield.settle(weights)), **offered).weights

    accepted = plan.accept(own, repaired.weights, **offered, repair=repair_again)
    accepted = replace(accepted, share=accepted.share * share * plan.outer.settings["lr"])
    clock.lap("accept")
    notes = (*notes, *accepted.notes)
    outcome = _outcome(own, own_weight, mixing, refused, permutations, accepted, notes, clock, aligned, repaired)
    return replace(outcome, doubtful=True) if bounded else outcome


def _outcome(
    own: Weights,
    own_weight: float,
    mixing: dict[str, float],
    refused: dict[str, str],
    permutations: dict[str, Permutations],
    accepted: Accepted,
    notes: tuple[str, ...],
    clock: StageTimer,
    aligned: Aligned,
    repaired: Repaired,
) -> MergeOutcome:
    return MergeOutcome(
        weights=accepted.weights if accepted.share else _copy(own),
        own_weight=own_weight,
        mixing=mixing,
        refused=refused,
        permutations=permutations,
        moved={name: moved_share(p) for name, p in permutations.items()},
        accepted=accepted.share,
        notes=notes,
        cpu_s=clock.seconds | {f"align.{part}": s for part, s in aligned.cpu_s.items()},
        images={"align": aligned.images, "repair": repaired.images},
    )


def adopt(own: Weights, peer: Peer, plan: MergePlan, context: MergeContext) -> Permutations:
    """Return the permutations that bring this agent's own weights into the peer's basis (basis gossip).

    `permute_weights(own, spec, adopt(...))`, and the optimizer's state likewise, are then in the peer's order of units.
    Empty if the plan does not align or the model has no symmetry groups. Raises PeerError for weights that the screen
    refuses, MergeError as `merge` does.
    """
    natures = natures_of(own, context.model)
    peer = replace(peer, weights=under_names(peer.weights, own, natures.first))
    tied = surely_tied(own, natures.first, context.model)
    own_norm = _check_own(own, context, natures, plan, tied)
    screen(own, peer.weights, peer.name, own_norm, natures, context.reference, **plan.screen)
    check_ties(peer.weights, peer.name, tied)
    return _align(peer.weights, [own], plan, context).permutations[0]


def check_mixing(weights: Sequence[float]) -> None:
    """Raise MergeError unless the weights are finite, not negative, and sum to 1."""
    if not all(isinstance(cast("Any", w), Real) or isinstance(w, Tensor) for w in weights):
        raise MergeError(f"mixing weights must be numbers, got {[*weights]}")
    if not all(isfinite(w) and w >= 0 for w in weights):
        raise MergeError(f"mixing weights must be finite and not negative, got {[*weights]}")
    if not isclose(sum(weights), 1.0, rel_tol=0, abs_tol=MIXING_TOLERANCE):
        raise MergeError(f"mixing weights must sum to 1, got {[*weights]} with sum {sum(weights):.6g}")


def _align(own: Weights, peers: Sequence[Weights], plan: MergePlan, context: MergeContext) -> Aligned:
    if not plan.aligns or not peers:
        return Aligned([{} for _ in peers])
    if context.spec is None or not context.spec.groups:
        return Aligned([{} for _ in peers], notes=("no symmetry groups are known: averaged without alignment",))
    return plan.align(own, peers, **context.offered())


def _view(weights: Weights, permutations: Permutations | None, context: MergeContext) -> Weights:
    return PermutedWeights(weights, context.spec, permutations) if permutations and context.spec else weights


def _check_own(
    own: Weights, context: MergeContext, natures: Natures, plan: MergePlan, tied: Mapping[str, str]
) -> float:
    """Check that own weights are finite and the model's, and return their norm."""
    if context.model is not None:
        expected = context.model.state_dict()
        for name in expected.keys() ^ own.keys():
            side = "missing from own weights" if name in expected else "not in the model"
            raise MergeError(f"tensor {name!r} is {side}; pass the model to which the weights belong")
        for name, tensor in expected.items():
            if tensor.shape != own[name].shape:
                raise MergeError(f"tensor {name!r} is {[*own[name].shape]}, in the model {[*tensor.shape]}")
    norm = norm_of(own, natures, lenient=plan.keep_not_finite)
    if context.model is not None and not plan.keep_not_finite:  # a NaN would not be equal to itself
        check_own_ties(own, tied)
    return norm


def _check_shapes(own: Weights, combined: Weights, method: str) -> None:
    """Raise MergeError if a method changed shapes, such as those that merge LoRA adapters on disk to another rank."""
    for name, tensor in combined.items():
        if name in own and tensor.shape != own[name].shape:
            raise MergeError(
                f"combine method {method!r} makes tensor {name!r} {[*tensor.shape]}, own is {[*own[name].shape]}: "
                "models in training keep their shapes; take lora-svd without its option rank"
            )


def _copy(weights: Weights) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in weights.items()}
