"""The loss barrier: how far the loss rises on the straight line between two networks.

    lines = barrier(mine, theirs, evaluate, model=model, data=batches, align=("none", "auto"))
    lines[1].barrier  # nats above the straight line between the losses at the ends

The merge of two networks lies on that line, so the barrier tells before any round whether a merge can help.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isclose, isfinite
from typing import Any

import torch
from torch import Tensor, nn

from dimat.config import MergeConfig, build
from dimat.errors import ConfigError, MergeError
from dimat.merge.api import Batches, Source
from dimat.merge.context import MergeContext
from dimat.merge.matching.assignment import moved_share
from dimat.merge.models.batches import as_data, first_inputs
from dimat.merge.natures import natures_of
from dimat.merge.pipeline import Peer, merge
from dimat.merge.plan import plan_merge
from dimat.merge.registry import align_registry
from dimat.merge.stages import Permutations, Weights
from dimat.merge.ties import under_names
from dimat.merge.weight_views import open_weights
from dimat.symmetry import derive_symmetry, permute_weights
from dimat.symmetry.spec import SymmetrySpec

LOSS = "loss"
"""Name of the metric of which the barrier is taken."""

SAME = 1e-3
"""Largest relative change of a network's own loss when its units change places."""

ANY_NORM = 1e30
"""Both networks are the caller's own: however much larger one is, it is measured."""

Evaluate = Callable[[Weights], Mapping[str, float]]
"""Gives the metrics of weights, "loss" among them."""


@dataclass(frozen=True)
class Line:
    """Metrics at points of the straight line between two networks.

    `align`: the method that brought the second network into the first one's order of units; `shares`: places of the
    points, from 0 (the first network) to 1; `metrics`: their values by name; `moved`: share of units that changed
    place; `cpu_s`: CPU seconds of the alignment; `notes`: what the alignment says.
    """

    align: str
    shares: tuple[float, ...]
    metrics: Mapping[str, tuple[float, ...]]
    moved: float = 0.0
    cpu_s: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def barrier(self) -> float:
        """Largest rise of the loss above the straight line between the ends, max_t L(t) − ((1 − t) L(0) + t L(1)), in
        the loss's units; 0 where it never lies above, ∞ where the loss is no number on the way. Frankle et al. 2020,
        arXiv 1912.05671."""
        losses = self.metrics[LOSS]
        if not all(map(isfinite, losses)):
            return inf
        ends = losses[0], losses[-1]
        return max(loss - (1 - t) * ends[0] - t * ends[1] for t, loss in zip(self.shares, losses, strict=True))


def barrier(
    one: Source,
    other: Source,
    evaluate: Evaluate,
    *,
    model: nn.Module,
    data: Batches | None = None,
    align: str | Sequence[str] = ("none", "auto"),
    points: int = 11,
    repair: str | Mapping[str, Any] = "batchnorm",
    spec: SymmetrySpec | None = None,
    seed: int = 0,
) -> list[Line]:
    """Measure the loss on the line from one network to another, once for each way of alignment.

    `evaluate`: metrics of a state dict, with "loss"; they should come from data that neither network was trained on.
    `model` gives the architecture; `data`: batches of its inputs, for alignment and repair; `points`: on the line, with
    both ends (3 or more); `repair`: a name, or {"name": …, "options": {…}}; applied at every point, ends included, so
    that what is seen is not the collapse of BatchNorm statistics, which any merge repairs. A point is merged as agents
    merge: ties, constants and statistics stay valid. Equal seeds give equal results. Raises ConfigError for unknown
    names and too few points, MergeError for networks that do not fit, a loss that is missing or not finite at an end,
    or an alignment that changes the function.
    """
    if points < 3:
        raise ConfigError(f"points is {points}; a line has its two ends and a point between, so 3 or more")
    screen = {"max_norm_ratio": ANY_NORM}
    plan = plan_merge(build(MergeConfig, {"method": "average", "repair": repair, "screen": screen}, "barrier"))
    batches = as_data(data)
    own = open_weights(one)
    theirs = under_names(open_weights(other), own, natures_of(own, model).first)
    for place, weights in (("first", own), ("second", theirs)):
        _check_fit(place, weights, model)
    shares = tuple(i / (points - 1) for i in range(points))

    def context() -> MergeContext:
        return MergeContext(model, spec, batches, generator=torch.Generator().manual_seed(seed))

    def measured(weights: Weights) -> Mapping[str, float]:
        alone = {"models": [weights], "mixing": [1.0]}
        return evaluate(plan.repair(dict(weights), **context().offered(), **alone).weights)

    def between(weights: Weights, share: float) -> Mapping[str, float]:
        peer = Peer("the other network", weights, share, same_basis=True)
        return evaluate(merge(own, 1 - share, [peer], plan, context(), refuse=False).weights)

    ends = [measured(weights) for weights in (own, theirs)]
    for place, values in zip(("first", "second"), ends):
        if not isfinite(values.get(LOSS, float("nan"))):
            raise MergeError(f"the {place} network's loss is {values.get(LOSS, 'missing')}; a barrier needs a number")
    lines: list[Line] = []
    for name in [align] if isinstance(align, str) else align:
        permutations: Permutations = {}
        notes: tuple[str, ...] = ()
        began = time.process_time()
        if align_registry.get(name) is not align_registry.get("none"):
            if batches is None:
                raise MergeError(f"align = {name!r} runs the networks: pass data, batches of their inputs")
            spec = spec or derive_symmetry(model, first_inputs(batches))
            began = time.process_time()
            found = align_registry.call(name, {}, own, [theirs], **replace(context(), spec=spec).offered())
            permutations, notes = found.permutations[0], tuple(found.notes)
        seconds = time.process_time() - began
        aligned: Mapping[str, Tensor] = permute_weights(theirs, spec, permutations) if permutations and spec else theirs
        last = measured(aligned) if permutations else ends[1]
        if not isclose(last[LOSS], ends[1][LOSS], rel_tol=SAME, abs_tol=SAME):
            raise MergeError(
                f"align = {name!r}: moving units changed the second network's loss from {ends[1][LOSS]:.6g} to "
                f"{last[LOSS]:.6g}; its symmetry groups are wrong (dimat symmetry verify), or evaluate draws at random"
            )
        inner = [between(aligned, share) for share in shares[1:-1]]
        told = [ends[0], *inner, ends[1]]
        metrics = {key: tuple(float(each[key]) for each in told) for key in ends[0]}
        moved = moved_share(permutations) if permutations else 0.0
        lines.append(Line(name, shares, metrics, moved, seconds, notes))
    return lines


def _check_fit(place: str, weights: Weights, model: nn.Module) -> None:
    expected = model.state_dict()
    for name in sorted(expected.keys() ^ set(weights)):
        how = "is missing" if name in expected else "is not in the model"
        raise MergeError(f"the {place} network: tensor {name!r} {how}; give two networks of the model's architecture")
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise MergeError(
                f"the {place} network: tensor {name!r} is {[*weights[name].shape]}, in the model {[*tensor.shape]}"
            )
        if weights[name].dtype != tensor.dtype:
            kinds = [str(each.dtype).removeprefix("torch.") for each in (weights[name], tensor)]
            raise MergeError(
                f"the {place} network: tensor {name!r} is {kinds[0]}, in the model {kinds[1]}; convert one"
            )
