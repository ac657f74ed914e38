"""Evaluates weights on a task's data: means of the loss and of the metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from dimat.device import autocast, own_streams, seeded_streams
from dimat.errors import DataError
from dimat.merge.models.functional import call_with
from dimat.symmetry.trace import eval_mode
from dimat.tasks.base import Data, Task
from dimat.tasks.data import batch_bounds
from dimat.train.contract import checked_batch, checked_loss, checked_metrics, loss_weight, task_errors
from dimat.train.model_state import check_fit


def evaluate(
    task: Task,
    model: nn.Module,
    data: Data,
    weights: Mapping[str, Tensor] | None = None,
    *,
    batch_size: int,
    precision: str,
    device: torch.device,
) -> dict[str, float]:
    """Return the means over `data` of the loss ("loss") and of the task's metrics, in eval mode.

    With `weights` (a whole state dict), those are evaluated and the model keeps its own. Neither mode nor random
    streams are disturbed. Raises DataError for empty data or weights of other shapes, HookError if the task's code
    fails or returns something invalid.
    """
    if len(data) == 0:
        raise DataError("no samples to evaluate on")
    held: dict[str, Tensor] | None = None
    if weights is not None:
        own = model.state_dict(keep_vars=True)
        check_fit(own, weights, "weights to evaluate")
        held = {name: weights[name].to(device, own[name].dtype) for name in own}
    sums: dict[str, list[Tensor]] = {}
    losses: list[Tensor] = []
    counted = 0.0
    streams = own_streams(seeded_streams(0, device), device)
    with eval_mode(model), streams, torch.no_grad(), task_errors(task, "evaluation"):
        for start, stop in pairwise(batch_bounds(len(data), batch_size)):
            batch = checked_batch(task, data.batch(torch.arange(start, stop)), stop - start, "data.batch()")
            inputs = tuple(t.to(device, non_blocking=True) for t in batch.inputs)
            targets = batch.targets.to(device, non_blocking=True)
            weight = loss_weight(task, targets)
            with autocast(precision, device):
                outputs = model(*inputs) if held is None else call_with(model, held, inputs)
                if weight:  # a mean over no label is no number
                    losses.append(checked_loss(task, task.loss(outputs, targets)) * weight)
                metrics = checked_metrics(task, task.metrics(outputs, targets), stop - start)
            counted += weight
            for name, value in metrics.items():
                sums.setdefault(name, []).append(value.sum())
    means = {"loss": _sum(losses) / counted if losses else math.nan}
    means |= {name: _sum(parts) / len(data) for name, parts in sums.items()}
    derived = getattr(task, "derived_metrics", None)
    return means if derived is None else {**means, **derived(means)}


def _sum(values: Sequence[Tensor]) -> float:
    return torch.stack(list(values)).cpu().double().sum().item()
