"""Keep a merge only if it does no harm: a metric may not fall by more than a tolerance."""

from __future__ import annotations

from collections.abc import Callable
from math import isnan
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dimat.errors import MergeError
from dimat.merge.combine.lora_svd import lora_svd
from dimat.merge.lora.factors import find_pairs
from dimat.merge.registry import accept_registry
from dimat.merge.stages import Accepted, Score, Weights

SHARES = (1.0, 0.5, 0.25)
"""Points tried on the segment from own (0) to merged (1) weights, in this order."""


@accept_registry.register("no-worse")
def no_worse(
    own: Weights,
    merged: Weights,
    *,
    score: Score | None,
    repair: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    on: Literal["local", "probe"] = "local",
    tolerance: Annotated[float, Field(ge=0)] = 0.02,
) -> Accepted:
    """Return the first of own + t (merged − own), t = 1, ½, ¼, with score ≥ score(own) − tolerance; else own.

    `score`: higher is better, a share in [0, 1] for accuracies, the negative of a loss or perplexity, in whose unit
    `tolerance` then is; a NaN counts as −∞. Points inside the segment
    are repaired like any merge before they are scored. Of LoRA factors they are points between the products B·A, at
    own's rank, since merged factors have a basis of their own. `on` names the set that the caller scores on: "local"
    is the agent's own hold-out, and on skewed data it rejects merges that are good for the network, since the classes
    that an agent learns from its peers are not in its own data; "probe" is the agreed public set.
    Raises MergeError if no score was passed in.
    """
    if score is None:
        raise MergeError('accept = "no-worse" needs a score: pass one, or choose accept = "always"')
    bar = _number(score(own)) - tolerance
    for share in SHARES:
        candidate = dict(merged)
        if share < 1:
            candidate = between(own, merged, share)
            candidate = repair(candidate) if repair else candidate
        if _number(score(candidate)) >= bar:
            notes = () if share == 1 else (f"score on the {on} set fell: went {share:g} of the way to the merge",)
            return Accepted(candidate, share, notes)
    return Accepted(dict(own), 0.0, (f"score on the {on} set fell by more than {tolerance:g}: kept own weights",))


def _number(score: float) -> float:
    return float("-inf") if isnan(score) else score


def between(own: Weights, merged: Weights, share: float) -> dict[str, Tensor]:
    """Return own + share · (merged − own); of LoRA factors the point between the products, at own's rank."""
    there = {name: tensor.to(own[name].device) for name, tensor in merged.items()}
    between = {
        name: torch.lerp(tensor, there[name], share) if tensor.is_floating_point() else tensor
        for name, tensor in own.items()
    }
    try:
        factors = [name for pair in find_pairs(own) for name in (pair.a, pair.b)]
    except MergeError:  # one of a pair alone: a tensor like any other
        factors = []
    if factors:
        ours, theirs = ({name: weights[name] for name in factors} for weights in (own, there))
        between |= lora_svd(ours, [theirs], [1 - share, share])
    return between
