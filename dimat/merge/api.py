"""Aligning and merging in one call from Python: `align_weights` and `merge_weights`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn

from dimat.config import MergeConfig, build
from dimat.errors import ConfigError, MergeError, nearest
from dimat.merge.context import MergeContext
from dimat.merge.models.batches import as_data, first_inputs
from dimat.merge.pipeline import Peer, check_mixing, merge
from dimat.merge.plan import MergePlan, needs_symmetry, plan_merge
from dimat.merge.registry import align_registry
from dimat.merge.shared_statistics import OWN
from dimat.merge.stages import Permutations, Points, Score, Weights
from dimat.merge.weight_views import open_weights
from dimat.registry import Bound
from dimat.symmetry import derive_symmetry
from dimat.symmetry.spec import SymmetrySpec

Source = Weights | str | PathLike[str]
"""Weights: a state dict, or the path of a safetensors file."""

Batches = Iterable[Tensor | Sequence[Tensor]] | Tensor
"""Model inputs: one tensor, or an iterable of batches, each a tensor or a tuple of the model's arguments."""

STAGES = ("align", "combine", "repair", "accept")
TABLES = ("screen", "outer", "layers", "head")
"""Other tables of a merge's configuration that are replaced whole."""


def align_weights(
    model: nn.Module,
    own: Source,
    peer: Source,
    spec: SymmetrySpec,
    data: Batches | None = None,
    using: str = "activations",
    points: Points | None = None,
    **options: Any,
) -> Permutations:
    """Return the permutations that bring a peer's weights into own's order of units.

    For each group id an int64 tensor p of shape (units,): merged unit j <- peer's unit p[j] (units of heads:
    (heads, units), a row for each merged head, of units of the head that it comes from), which is what
    `permute_weights(peer, spec, permutations)` applies. `using` names the align method ("activations" needs
    `data`, "weights" does not), `options` are its options. `points` pins where groups are observed: {group id: points
    of the spec or names of their nodes}. Raises ConfigError for unknown names and options, DataError for unreadable
    files.

        spec = derive_symmetry(model, (images,))
        permutations = align_weights(model, own, peer, spec, data=[images])
        aligned = permute_weights(peer, spec, permutations)
    """
    context = MergeContext(model, spec, as_data(data), points=points)
    aligned = align_registry.call(using, options, open_weights(own), [open_weights(peer)], **context.offered())
    return aligned.permutations[0]


def merge_weights(
    own: Source,
    peers: Sequence[Source],
    mixing: Sequence[float],
    method: str = "dimat",
    *,
    model: nn.Module | None = None,
    data: Batches | None = None,
    base: Source | None = None,
    aux: Sequence[Source] | None = None,
    spec: SymmetrySpec | None = None,
    points: Points | None = None,
    score: Score | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Return own weights merged with peers': θ = Σ_k w_k θ'_k over aligned weights, then repaired.

    `mixing`: own weight first, then the peers'; sums to 1. `method`: a preset. `model` gives the architecture
    and is left as it is; `data`: batches of its inputs in random order (passes over them stop early, see
    `stable_within` of the methods), for methods that align or re-estimate BatchNorm. The symmetry spec is
    derived from the model unless handed in. `score` serves accept = "no-worse".
    `aux`: statistics for "fisher", "regmean", repair = "head" and head = "rows", own's first and then the peers'
    (`empirical_fisher`, `gram_matrices`, `class_statistics`, `class_counts_of`). `base`: for methods that merge deltas.
    `options`: `align`, `combine`, `repair`, `accept` replace a stage of the preset (a name, or {"name": …,
    "options": {…}}), `screen` sets the screen's options, `outer` ({"lr": 0.5}) and `layers`
    ({"head.*": 0}) how far the merge goes, `head` how a classifier's rows are averaged; any other is an option of the
    chosen methods, handed to every stage whose method has one of that name, e.g. `max_images=500`.
    Raises ConfigError (names, options), MergeError (mixing, own weights, missing model or data, a result that is not
    finite), PeerError (a peer's tensors do not fit or are not finite, a variance is negative), DataError (unreadable
    files). Own weights are untouched.

        merged = merge_weights(mine, ["lab-b.safetensors"], [0.5, 0.5], model=model, data=[images])
    """
    plan = _plan(method, options)
    if plan.shares != "weights":
        raise ConfigError(f'method "{method}" exchanges {plan.shares} and merges no weights; use another one')
    if isinstance(cast("Any", peers), str | Mapping):
        raise MergeError("peers is a list of weights, also of a single peer's: [weights]")
    for given in (own, *peers):
        if not isinstance(cast("Any", given), Mapping | str | PathLike):
            kind = type(given).__name__
            raise MergeError(f"weights are a {kind}; give a state dict, e.g. model.state_dict(), or a file's path")
    if len(mixing) != len(peers) + 1:
        raise MergeError(f"{len(peers)} peers need {len(peers) + 1} mixing weights, own first; got {len(mixing)}")
    check_mixing(mixing)
    batches = as_data(data)
    if spec is None and needs_symmetry(plan):
        if model is None or batches is None:
            stages = f"align = {plan.align.name!r} and combine = {plan.combine.name!r}"
            raise MergeError(f"method {method!r} with {stages} needs model= and data=")
        spec = derive_symmetry(model, first_inputs(batches))
    if aux is not None and len(aux) != len(mixing):
        raise MergeError(f"{len(peers)} peers need {len(mixing)} sets of statistics, own first; got {len(aux)}")
    named = [Peer(_name(i, peer), open_weights(peer), w) for i, (peer, w) in enumerate(zip(peers, mixing[1:]))]
    statistics = None if aux is None else dict(zip([OWN, *(p.name for p in named)], map(open_weights, aux)))
    start = None if base is None else open_weights(base)
    context = MergeContext(model, spec, batches, score, start, statistics, generator, points=points)
    return merge(open_weights(own), mixing[0], named, plan, context, refuse=False).weights


def _name(index: int, source: Source) -> str:
    return f"peer {index}" if isinstance(source, Mapping) else f"peer {index} ({source})"


def _plan(method: str, options: Mapping[str, Any]) -> MergePlan:
    """Return the plan of a preset with whole stages and single options replaced."""
    stages = {key: value for key, value in options.items() if key in STAGES or key in TABLES}
    plan = plan_merge(build(MergeConfig, {"method": method, **stages}, "merge_weights"))
    chosen: dict[str, Bound[Any]] = {stage: getattr(plan, stage) for stage in STAGES}
    extra: dict[str, dict[str, Any]] = {stage: {} for stage in STAGES}
    for key, value in options.items():
        if key in stages:
            continue
        owners = [stage for stage in STAGES if key in chosen[stage].settings]
        if not owners:
            known = {name for stage in STAGES for name in chosen[stage].settings}
            raise ConfigError(f"merge_weights has no option {key!r} with method {method!r}{nearest(key, known)}")
        for stage in owners:
            extra[stage][key] = value
    tables = {s: {"name": c.name, "options": {**c.options, **extra[s]}} for s, c in chosen.items()}
    tables |= {key: value for key, value in stages.items() if key in TABLES}
    return plan_merge(build(MergeConfig, {"method": method, **tables}, "merge_weights"))
