"""Self Positioning: where in the space that task vectors span a probe set is served best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isnan, log
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dimat.errors import MergeError
from dimat.merge.models.learned import Span, batches_of, cross_entropy, descend, needs_model
from dimat.merge.registry import combine_registry
from dimat.merge.stages import Data, Inputs, Score, Weights
from dimat.merge.tensors.streaming import needs_base
from dimat.merge.tensors.task_vectors import copy_of, participants_of

PARALLEL = 1e-6
"""Directions whose sine is below this are interpolated along the straight line."""


@combine_registry.register("self-positioning", holds="deltas")
def self_positioning(
    own: Weights,
    peers: Sequence[Weights],
    mixing: Sequence[float],
    *,
    base: Weights | None = None,
    model: nn.Module | None = None,
    data: Data | None = None,
    score: Score | None = None,
    objective: Literal["ensemble", "score"] = "ensemble",
    interpolation: Literal["slerp", "linear"] = "slerp",
    steps: Annotated[int, Field(ge=0)] = 100,
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.01,
    penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0,
    batch_size: Annotated[int, Field(ge=1)] | None = 64,
    scaling: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0,
    class_dim: int = -1,
) -> Weights:
    """Return θ = θ_base + λ · V(a), with λ > 0 and one a_k > 0 per model that minimise a loss on a probe set + μλ.

    V goes from one task vector to the next, V_1 = τ_1, V_i = slerp(V_{i−1}, τ_i, t_i) with t_i = a_i / Σ_{j≤i} a_j,
    slerp(u, v, t) = sin((1−t)α)/sin α · u + sin(tα)/sin α · v with α the angle of u and v over all parameters;
    `interpolation` = "linear" takes V = Σ_k a_k τ_k / Σ_k a_k. μ is `penalty`. Whatever V is, it is Σ_k c_k τ_k
    with c from the Gram matrix of the τ, so one backward pass through the model gives the gradient.

    `objective`: "ensemble" needs no labels: the loss is the cross-entropy of the merged model's softmax outputs
    with Σ_k w_k softmax(outputs of model k) on `data`; `steps` of Adam at rate `lr` on log a and log λ, each on
    `batch_size` examples (None: a whole batch) in the order of the data. "score": `score` of the merged weights
    (higher is better, taken on a labelled set) by Nelder and Mead's search with at most `steps` looks; the best
    position seen is taken. For an agreed probe set choose merge.align_data = "probe"; "score" is on it always.

    `mixing` (own first, sum 1): a starts at w, λ at `scaling`, w also weighs the ensemble. Equal models come back
    scaled by the λ that is found, not as they are. Running statistics and other tensors without gradients are
    averaged with the mixing weights. Nothing is drawn at random.
    Raises MergeError without base, without model and data ("ensemble") or score ("score"), or where a loss is not
    finite.

    Paper: Li et al., "Improving General Text Embedding Model: Tackling Task Conflict and Data Imbalance through Model
    Merging", 2024, arXiv 2410.15035, which calls it so: coefficients in the interpolation space of task vectors, by
    stochastic gradient descent on a probe set. Its formulas are known to us from notes of a reproduction. There the
    loss is the training's (contrastive, with labels), and t_i weighs a_i against the mean of those before it; here
    against their sum, so that equal weights count equally. Models enter from the longest task vector to the shortest,
    so that their order does not matter.
    """
    base = needs_base(base, "self-positioning")
    cast = participants_of(own, peers, mixing)
    if cast is None:
        return copy_of(own)
    if model is None:
        raise MergeError("combine method 'self-positioning' learns its coefficients: pass the model")
    span = Span(cast, base, model, class_dim)
    gram = span.gram()
    between: Callable[[Tensor], Tensor] = _linear if interpolation == "linear" else lambda a: _spherical(a, gram)

    def placed(logs: Tensor) -> Tensor:
        return logs[-1].exp() * between(logs[:-1].exp())

    start = torch.tensor([*map(log, cast.coefficients), log(scaling)], dtype=torch.float64)
    if objective == "score":
        found = _searched(start, placed, span, score, steps, penalty)
    else:
        model, data = needs_model(model, data, "self-positioning")
        batches = batches_of(data, steps, batch_size) if steps else []
        targets = [_ensemble(span, inputs) for inputs in batches]

        def gradient(logs: Tensor, step: int) -> Tensor:
            i = step % len(batches)
            with torch.enable_grad():
                logs = logs.clone().requires_grad_()
                c = placed(logs)
                whole = c.detach()[:, None].expand(-1, len(span.layers))
                by_c = span.gradient(whole, batches[i], lambda logits: cross_entropy(logits, targets[i]))[1].sum(1)
                return torch.autograd.grad((c * by_c).sum() + penalty * logs[-1].exp(), logs)[0]

        found = descend(start, gradient, steps=steps, lr=lr)
    return span.merged(placed(found)[:, None])


def _ensemble(span: Span, inputs: Inputs) -> Tensor:
    """Return the mean of the models' softmax outputs by their mixing weights, classes last."""
    parts = [w * span.member(k, inputs).softmax(-1) for k, w in enumerate(span.shares)]
    return torch.stack(parts).sum(0)


def _searched(
    start: Tensor,
    placed: Callable[[Tensor], Tensor],
    span: Span,
    score: Score | None,
    steps: int,
    penalty: float,
) -> Tensor:
    """Return the best position that a search without gradients sees; `start` where nothing is better."""
    if score is None:
        raise MergeError("combine method 'self-positioning' with objective = \"score\" needs score=, higher is better")
    judge, best, highest = score, start, float("-inf")

    def cost(values: Any) -> float:
        nonlocal best, highest
        logs = torch.as_tensor(values, dtype=torch.float64).clone()
        value = float(judge({**span.merged(placed(logs)[:, None])})) - penalty * float(logs[-1].exp())
        if value > highest:
            best, highest = logs, value
        return float("inf") if isnan(value) else -value

    simplex = torch.cat([start[None], start + 0.5 * torch.eye(len(start), dtype=start.dtype)])
    options: Any = {"maxfev": steps, "initial_simplex": simplex.numpy(), "xatol": 1e-3, "fatol": 0.0}
    if steps:
        from scipy.optimize import minimize  # takes 0.2 CPU-s to import

        minimize(cost, start.numpy(), method="Nelder-Mead", options=options)
    return best


def _linear(a: Tensor) -> Tensor:
    return a / a.sum()


def _spherical(a: Tensor, gram: Tensor) -> Tensor:
    """Return c with V(a) = Σ_k c_k τ_k; `gram` holds the inner products of the τ."""
    units = torch.eye(len(a), dtype=a.dtype)
    first, *others = gram.diagonal().argsort(descending=True, stable=True).tolist()
    c, total = units[first], a[first]
    for k in others:
        total = total + a[k]
        t = a[k] / total
        cosine = (c @ gram[k]) / ((c @ gram @ c).clamp_min(0) * gram[k, k]).sqrt()
        if not 1 - float(cosine.detach()) ** 2 > PARALLEL**2:  # a vector of length 0 has no angle: NaN
            c = (1 - t) * c + t * units[k]
        else:
            angle = cosine.acos()
            c = (((1 - t) * angle).sin() * c + (t * angle).sin() * units[k]) / angle.sin()
    return c
