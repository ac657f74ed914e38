"""Classifier calibration: BatchNorm re-estimated, then the head fitted to virtual features.

Averaging hurts a classifier's last layer most if agents have different classes. Agents therefore send with their
weights a Gaussian of the head's inputs for each class that they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dimat.errors import MergeError
from dimat.merge.accept.no_worse import between
from dimat.merge.class_statistics import MEAN, ClassGaussians, pooled
from dimat.merge.growth import Reference
from dimat.merge.models.classifier import RANK, class_statistics
from dimat.merge.registry import repair_registry
from dimat.merge.repair.batchnorm import batchnorm, running_statistics
from dimat.merge.stages import Data, Repaired, Weights

MOST_VIRTUAL = 20_000
"""Most virtual features in all; of many classes each has fewer."""
SIZE = 2.0
"""How many times as large as own training has made them a fit may make a head's weight and bias."""
LEAST_SCALE = 1e-2
"""Features smaller than this, as a share of the root mean square of all, are scaled as if they were not."""


@repair_registry.register("head", renews=running_statistics, statistics=class_statistics)
def head(
    weights: Weights,
    *,
    model: nn.Module | None,
    data: Data | None,
    aux: Sequence[Weights] | None = None,
    generator: torch.Generator | None = None,
    reference: Reference | None = None,
    covariance: Literal["diagonal", "low-rank"] = "diagonal",
    rank: Annotated[int, Field(ge=1)] = RANK,
    clip: Annotated[float, Field(gt=0)] | None = None,
    noise: Annotated[float, Field(ge=0)] = 0.0,
    virtual: Annotated[int, Field(ge=1)] = 100,
    steps: Annotated[int, Field(ge=1)] = 20,
    pull: Annotated[float, Field(gt=0)] = 1.0,
) -> Repaired:
    """Return the weights with BatchNorm re-estimated as `batchnorm` does by default, and the head refitted.

    The statistics by class of `aux` (own first, in own's basis) are pooled by their counts; `virtual` features (fewer
    where there are very many classes) of each class that anybody has are drawn with `generator`, and `refitted` fits
    the head's rows of these classes to them, with equal weight for each class. Rows of other classes stay as merged.
    With a `reference` the fit stops where weight and bias are `SIZE` times as large as after own training,
    so that they do not grow from merge to merge.
    `covariance`, `rank`, `clip`, `noise`: of the statistics, see `class_statistics`.
    Raises MergeError where statistics or the generator are missing, and as `batchnorm`.

    Paper: Luo et al., "No Fear of Heterogeneity: Classifier Calibration for Federated Learning with Non-IID Data",
    NeurIPS 2021, arXiv 2106.05001; there once after training, with features of the merged network. Here features are
    those of each agent's own network, before the merge.
    """
    mended = batchnorm(weights, model=model, data=data)
    names = [key.removeprefix(MEAN) for key in (aux or [{}])[0] if key.startswith(MEAN)]
    if aux is None or not names or any(MEAN + name not in theirs for theirs in aux for name in names):
        raise MergeError('repair "head" needs every model\'s statistics: see models.classifier.class_statistics')
    if generator is None:
        raise MergeError('repair "head" draws at random: pass a seeded generator=')
    repaired = dict(mended.weights)
    for name in names:
        found = pooled([ClassGaussians.of(theirs, name) for theirs in aux])
        present = found.count.nonzero().flatten()
        each = max(1, min(virtual, MOST_VIRTUAL // max(len(present), 1)))
        features = found.draw(present.tolist(), each, generator)
        labels = present.repeat_interleave(each)
        key = f"{name.removesuffix('weight')}bias"
        bias = repaired[key].detach().cpu() if key in repaired else None
        new, shift = refitted(repaired[name].detach().cpu(), bias, features, labels, steps=steps, pull=pull)
        fitted = {name: new} if shift is None else {name: new, key: shift}
        fitted = {each: tensor.to(repaired[each]) for each, tensor in fitted.items()}
        merged = {each: repaired[each] for each in fitted}
        if reference is not None:
            share, _ = reference.without(reference.norms.keys() - fitted.keys()).share(merged, fitted, SIZE)
            fitted = between(merged, fitted, share) if share < 1 else fitted
        repaired |= fitted
    return Repaired(repaired, mended.images, mended.notes)


def refitted(
    weight: Tensor, bias: Tensor | None, features: Tensor, labels: Tensor, *, steps: int, pull: float
) -> tuple[Tensor, Tensor | None]:
    """Return weight (C, d) and bias (C,) of a linear classifier, fitted to features (N, d) of labels (N,), in float64.

    Minimised is the cross-entropy over the classes that are among the labels, plus pull/2 times the squared distance
    from where their rows and biases began, for features scaled to a root mean square of 1: by `steps` iterations of
    L-BFGS at most, from there. So a fit moves them by no more than √(2 · cross-entropy before / pull) in all, and their
    mean not at all, which is how they keep their level beside the other classes' rows.
    """
    present, targets = labels.unique(return_inverse=True)
    rows = weight.double().clone()
    shifts = None if bias is None else bias.double().clone()
    if len(present) < 2:
        return rows, shifts
    x = features.double()
    squares = x.square().mean(0)
    scale = squares.sqrt().clamp_min(LEAST_SCALE * float(squares.mean().sqrt()))
    scale = torch.where(scale > 0, scale, 1.0)
    x = x / scale
    start = rows[present] * scale
    offset = torch.zeros(len(present), dtype=torch.float64) if shifts is None else shifts[present]
    with torch.enable_grad():
        move = torch.zeros_like(start).requires_grad_()
        step = torch.zeros_like(offset).requires_grad_()
        free = [move] if shifts is None else [move, step]
        optimizer = torch.optim.LBFGS(free, max_iter=steps, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            fault = cross_entropy(x @ (start + move).mT + offset + step, targets)
            loss = fault + pull / 2 * (move.square().sum() + step.square().sum())
            loss.backward()
            return loss

        run: Any = optimizer.step
        run(closure)
    rows[present] += move.detach() / scale
    if shifts is not None:
        shifts[present] += step.detach()
    return rows, shifts
