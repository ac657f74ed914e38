"""Averages a classifier's rows over the agents that have the class: `merge.head = "rows"`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dimat.errors import MergeError
from dimat.merge.class_statistics import COUNT
from dimat.merge.stages import Weights
from dimat.merge.weight_views import WeightsView


def rows_by_class(
    combined: Weights, models: Sequence[Weights], weights: Sequence[float], aux: Sequence[Weights] | None
) -> Weights:
    """Return combined weights with the head's rows averaged by class: W[c] = Σ_k w_k n_kc W_k[c] / Σ_k w_k n_kc, the
    bias likewise.

    `models`, `weights` and `aux`: own's first; n_kc, `class_count.<tensor>` of `aux`, (classes,), is model k's number
    of examples of class c. If no model of positive weight has examples of a class, its row stays as combined, and so
    do all other tensors. Sums are in float64. Raises MergeError if a model has no counts.
    """
    names = [key.removeprefix(COUNT) for key in (aux or [{}])[0] if key.startswith(COUNT)]
    if aux is None or not names or any(COUNT + name not in theirs for theirs in aux for name in names):
        raise MergeError('head = "rows" needs every model\'s counts of classes: see models.classifier.class_counts_of')
    shares: dict[str, Tensor] = {}
    for name in names:
        counts = torch.stack([theirs[COUNT + name].detach().cpu().double() for theirs in aux])
        found = counts * torch.tensor(weights, dtype=torch.float64)[:, None]
        shares[name] = found / found.sum(0).where(found.sum(0) > 0, torch.ones(()))
        bias = f"{name.removesuffix('weight')}bias"
        if bias in combined and bias != name:
            shares[bias] = shares[name]
    return _ByClass(combined, models, shares)


class _ByClass(WeightsView):
    """Combined weights; tensors with shares, (models, classes), are averaged row by row when they are asked for."""

    def __init__(self, combined: Weights, models: Sequence[Weights], shares: dict[str, Tensor]) -> None:
        super().__init__(combined)
        self._combined = combined
        self._models = models
        self._shares = shares

    def __getitem__(self, name: str) -> Tensor:
        plain = self._combined[name]
        if name not in self._shares:
            return plain
        own = self._models[0][name].detach().cpu().double()
        shares = self._shares[name].reshape(len(self._models), -1, *[1] * (own.ndim - 1))
        mean = own.clone()
        for share, model in zip(shares[1:], self._models[1:]):
            mean += share * (model[name].detach().cpu().double() - own)
        somebody = shares.sum(0) > 0
        return torch.where(somebody.to(plain.device), mean.to(plain), plain)
