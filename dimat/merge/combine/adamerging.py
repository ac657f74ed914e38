"""AdaMerging: coefficients of task vectors that make the merged model's outputs certain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dimat.merge.models.learned import Span, batches_of, cross_entropy, descend, needs_model
from dimat.merge.registry import combine_registry
from dimat.merge.stages import Data, Weights
from dimat.merge.tensors.pieces import Pieces
from dimat.merge.tensors.sparsify import smallest_kept, trimmed
from dimat.merge.tensors.streaming import needs_base
from dimat.merge.tensors.task_vectors import Density, Number, copy_of, elected_sign, participants_of


@combine_registry.register("adamerging", holds="deltas")
def adamerging(
    own: Weights,
    peers: Sequence[Weights],
    mixing: Sequence[float],
    *,
    base: Weights | None = None,
    model: nn.Module | None = None,
    data: Data | None = None,
    granularity: Literal["layer", "task"] = "layer",
    steps: Annotated[int, Field(ge=0)] = 100,
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.001,
    batch_size: Annotated[int, Field(ge=1)] | None = 64,
    scaling: Number = 1.0,
    density: Density | None = None,
    class_dim: int = -1,
) -> Weights:
    """Return θ^l = θ_base^l + Σ_k λ_k^l τ_k^l with the λ that minimise the mean entropy of softmax outputs on `data`.

    `granularity`: "layer", a λ for each model and parameter tensor, or "task", one for each model. `steps` of Adam
    with rate `lr`, each on `batch_size` examples (None: a whole batch of the data) in the order of the data, over and
    over; all λ stay in [0, 1]. Entropy is taken along the outputs' axis `class_dim`. `density`: AdaMerging++, deltas
    are first trimmed to their largest magnitudes, tensor by tensor, and lose what has not the elected sign (see ties).
    The authors take 500 steps from λ = 0.3, batches of 16, and trim over the whole vector at 0.2. Fewer steps are for
    merges that come every round: far from the start, low entropy also comes from large weights. On digits (five agents,
    Dirichlet 0.5, two seeds, accuracy after 5 merges) 100 steps at 0.001 gave 0.89, at 0.01 0.80, averaging 0.88.

    `mixing` (own first, sum 1): λ starts at min(1, `scaling` · w_k), so `steps` 0 is task arithmetic; the paper's
    start is `scaling` = 0.3·n with equal weights. The λ that are found need not sum to 1: equal models and a single
    peer do not come back as they are, unless their deltas are 0. Running statistics and other tensors without
    gradients are averaged with the mixing weights; the model runs in evaluation mode with these, so where BatchNorm is
    in use let `repair` follow. Entropy also falls where a model is sure and wrong: a peer that wants to can win, and
    labs that do not trust each other take a robust method. Shapes: any. Nothing is drawn at random.
    Raises MergeError without base, model or data, or where the loss is not finite.

    Paper: Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task Learning", ICLR 2024, arXiv 2310.02575;
    facts from the authors' program. There are no several heads here: all agents' outputs are of one task.
    """
    base = needs_base(base, "adamerging")
    cast = participants_of(own, peers, mixing)
    if cast is None:
        return copy_of(own)
    model, data = needs_model(model, data, "adamerging")

    def selected(deltas: list[Tensor]) -> list[Tensor]:
        if density is None:
            return deltas
        least = smallest_kept(Pieces(deltas, deltas[0]), [density] * len(deltas))
        large = [trimmed(delta, low) for delta, low in zip(deltas, least)]
        sign = elected_sign(large, cast.coefficients)
        return [delta.masked_fill(delta * sign <= 0, 0.0) for delta in large]

    span = Span(cast, base, model, class_dim, selected)
    start = (torch.tensor(cast.coefficients, dtype=torch.float64) * scaling).clamp_(0, 1)
    start = start[:, None].expand(-1, len(span.layers) if granularity == "layer" else 1)
    batches = batches_of(data, steps, batch_size) if steps else []

    def gradient(point: Tensor, step: int) -> Tensor:
        whole = point.expand(-1, len(span.layers))
        found = span.gradient(whole, batches[step % len(batches)], cross_entropy)[1]
        return found if granularity == "layer" else found.sum(1, keepdim=True)

    return span.merged(descend(start, gradient, steps=steps, lr=lr, bounds=(0.0, 1.0)))
