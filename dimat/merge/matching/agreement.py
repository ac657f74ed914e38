"""How well a merged network agrees in function with its two parents; needs no labels."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from dimat.merge.matching.correlation import PIECE
from dimat.merge.models.batches import device_of, on_device, take
from dimat.merge.models.functional import call_with, tensors_for
from dimat.merge.repair.batchnorm import batchnorm
from dimat.merge.stages import Data, Inputs, Weights
from dimat.symmetry import tree
from dimat.symmetry.trace import eval_mode

COMPARED = 256
"""Examples on which ways to align are compared, at most."""


def half_way(own: Weights, peer: Weights) -> dict[str, Tensor]:
    """Return the mean of two networks; integers are own's."""
    return {
        name: tensor.lerp(peer[name].to(tensor), 0.5)
        if tensor.is_floating_point() or tensor.is_complex()
        else tensor.clone()
        for name, tensor in own.items()
    }


def agreements(
    own: Weights,
    peer: Weights,
    merged: Sequence[Weights],
    *,
    model: nn.Module,
    data: Data,
    outputs: Sequence[int] = (),
    max_images: int | None = None,
) -> list[float]:
    """Return, for each merged network, how close its outputs are to the mean of own's and the peer's:

        1 − Σ (m − t)² / Σ t²,   t = (f(own) + f(peer)) / 2,   m = f(merged), both centred along the last axis,

    since adding a number to all logits changes nothing (outputs of one column are centred over all rows). 1: the same
    function; 0: no better than constant outputs; negative: worse. Unlike a correlation it depends on the scale and the
    mean of outputs, and so follows the loss of the half-way average. It is the mean over floating-point outputs
    that have a batch axis (those numbered in `outputs`, if any). −inf where m is not finite; 0 where t does not vary.
    BatchNorm statistics of merged networks are re-estimated on the same examples.
    All networks see the same pieces of up to 32 of at most `max_images` examples; all merged ones are held in memory.
    """
    device = device_of(model)
    parties = [tensors_for(model, weights, device) for weights in (own, peer)]
    for weights in merged:
        repaired = batchnorm(weights, model=model, data=data, max_images=max_images).weights
        parties.append(tensors_for(model, repaired, device))
    fits = [dict[int, _OutputFit]() for _ in merged]
    for batch in take(data, max_images, PIECE):
        inputs = on_device(batch, device)
        first, second, *rest = (_run(model, tensors, inputs, outputs) for tensors in parties)
        for found, fit in zip(rest, fits):
            for number, (a, b, m) in enumerate(zip(first, second, found)):
                fit.setdefault(number, _OutputFit()).add((a + b) / 2, m)
    return [sum(fit.nearness() for fit in each.values()) / max(len(each), 1) for each in fits]


def _run(model: nn.Module, tensors: dict[str, Tensor], inputs: Inputs, outputs: Sequence[int]) -> list[Tensor]:
    """Return what a model gives out at some weights: of each floating-point output, rows and columns in float64."""
    with eval_mode(model), torch.no_grad():
        leaves: list[Any] = tree.leaves(call_with(model, tensors, inputs))
    chosen = [leaves[index] for index in outputs] if outputs else leaves
    wide = torch.float32 if any(t.device.type == "mps" for t in inputs) else torch.float64
    return [
        leaf.reshape(-1, leaf.shape[-1] if leaf.ndim > 1 else 1).to(wide)
        for leaf in chosen
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim and leaf.numel()
    ]


class _OutputFit:
    """Sums of one output's squares: of the target, and of what a merged network is off by."""

    def __init__(self) -> None:
        self._rows = 0
        self._target = self._error = self._squares = self._errors = 0.0

    def add(self, target: Tensor, fitted: Tensor) -> None:
        """Add rows; (rows, columns) each."""
        error = fitted - target
        if target.shape[1] > 1:
            target, error = (x - x.mean(1, keepdim=True) for x in (target, error))
        else:
            self._target += float(target.sum())
            self._error += float(error.sum())
        self._rows += len(target)
        self._squares += float(target.square().sum())
        self._errors += float(error.square().sum())

    def nearness(self) -> float:
        """Return 1 − (sum of squared errors) / (sum of the target's squares)."""
        whole = self._squares - self._target**2 / self._rows
        missed = self._errors - self._error**2 / self._rows
        if not isfinite(missed):
            return float("-inf")
        return 1 - missed / whole if whole > 0 else 0.0
