"""Layer swapping: takes each tensor from one model, chosen by a pattern of names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field

from dimat.errors import MergeError
from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import MergePieces, Pieces
from dimat.merge.tensors.streaming import combine_elements
from dimat.merge.tensors.task_vectors import copy_of, weighted_sum

Choice = Annotated[int, Field(ge=0)] | Literal["average"]
"""A model by number, own is 0 and peers count from 1, or the weighted average."""


@combine_registry.register("layer-swap", holds="pieces")
def layer_swap(
    own: Weights,
    peers: Sequence[Weights],
    mixing: Sequence[float],
    *,
    layers: Mapping[str, Choice] | None = None,
    rest: Choice = "average",
) -> Weights:
    """Return for each tensor that of the model which the first matching pattern of `layers` names, else of `rest`.

    `layers`: pattern of tensor names (`*`, `?`, `[…]`; case counts) → whose tensor: 0 is own's, k that of the k-th peer
    as handed in (peers that were refused or have weight 0 are not among those of a round), "average" the weighted
    average Σ_k w_k θ_k. The paper takes the outer layers from one expert, the inner ones from another, and averages
    where they meet. Integer and boolean tensors are own's.

    `mixing`: own first, sum 1; it counts where tensors are averaged, and with weight 1 on self all are own's.
    Raises MergeError for a number beyond the models at hand, and for a pattern that no tensor's name matches.

    Paper: Bandarkar et al., "Layer Swapping for Zero-Shot Cross-Lingual Transfer in Large Language Models", ICLR 2025,
    arXiv 2410.01335.
    """
    if not any(mixing[1:]):
        return copy_of(own)
    rules = {**(layers or {})}
    for pattern in rules:
        if not any(fnmatchcase(name, pattern) for name in own):
            raise MergeError(f"layer-swap: no tensor's name matches {pattern!r}; names are like {next(iter(own))!r}")
    for where, choice in [*rules.items(), ("rest", rest)]:
        if isinstance(choice, int) and choice > len(peers):
            raise MergeError(f"layer-swap: {where!r} takes model {choice}, there are own (0) and {len(peers)} peers")

    def plan(name: str, _: Pieces) -> MergePieces:
        choice = next((choice for pattern, choice in rules.items() if fnmatchcase(name, pattern)), rest)
        if isinstance(choice, int):
            return lambda values: values[choice]
        return lambda values: values[0] + weighted_sum([other - values[0] for other in values[1:]], mixing[1:])

    return combine_elements(own, peers, plan)
