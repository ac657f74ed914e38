"""Distillation: the knowledge of other models, into an agent's own, by their logits.

Hinton et al. 2015, arXiv 1503.02531:

    L = (1 − w) · loss(z, y) + w · T² · KL(p̄ ‖ softmax(z' / T))

z are the model's logits for a batch of the agent's own examples, and loss is that of `train.loss`. By a `Lesson`, of
teachers that are there as weights of the same model, z' = z and p̄ = softmax(z̄ / T), z̄ the mean of the teachers' logits
for the same inputs, in whatever order of units each of them is. By a `ProbeLesson`, of teachers of any kind that are
known only by what they say of a probe set, z' are the model's logits for a batch of that set, whose labels nobody uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimat.config import DistilConfig
from dimat.device import autocast, own_streams, seeded_streams
from dimat.errors import ConfigError
from dimat.merge.models.functional import call_with
from dimat.symmetry.trace import eval_mode
from dimat.tasks.base import Batch, Data, Task
from dimat.tasks.data import batch_bounds
from dimat.train.contract import task_errors
from dimat.train.losses import divergence, logits_of


def check_teachable(task: Task, key: str) -> None:
    """Raise ConfigError, naming the setting `key`, if a task's model cannot be distilled from logits."""
    if getattr(task, "train_step", None) is not None:
        raise ConfigError(f"{key} teaches by logits, and task {task.name} has a train_step of its own")
    if getattr(task, "logits", None) is None:
        raise ConfigError(
            f"{key} teaches by logits over classes, and task {task.name} does not say that it has any (`logits`)"
        )


class Teaches(Protocol):
    """Makes the loss L of a batch, or of a part of one, of the model's own loss. The model is in training mode."""

    def __call__(self, task: Task, model: nn.Module, batch: Batch, outputs: Any, loss: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Lesson:
    """Teachers' outputs on an agent's examples. `teachers`: full state dicts of its model, on its device."""

    teachers: Sequence[Mapping[str, Tensor]]
    config: DistilConfig

    def __call__(self, task: Task, model: nn.Module, batch: Batch, outputs: Any, loss: Tensor) -> Tensor:
        """Return L of a batch, given the model's outputs for it and their loss; the model ends in training mode."""
        logits = logits_of(task, outputs)
        assert logits is not None
        with torch.no_grad(), eval_mode(model):
            said = [logits_of(task, call_with(model, teacher, batch.inputs)) for teacher in self.teachers]
        mean = torch.stack([each for each in said if each is not None]).mean(0)
        weight, heat = self.config.weight, self.config.temperature
        return (1 - weight) * loss + weight * heat**2 * divergence(logits / heat, mean / heat)


class ProbeLesson:
    """What teachers say of a probe set. `said`: p̄ (examples, classes), on the model's device; `order`: draws the order
    in which the examples are gone through, again and again; `weight`, `temperature`: w and T.

    A batch has as many probe examples as own ones, in a forward pass of its own: BatchNorm normalises each by itself,
    and its running statistics follow both.
    """

    def __init__(self, probe: Data, said: Tensor, weight: float, temperature: float, order: torch.Generator) -> None:
        self._probe = probe
        self._said = said
        self._weight = weight
        self._temperature = temperature
        self._generator = order
        self._left = torch.zeros(0, dtype=torch.int64)

    def __call__(self, task: Task, model: nn.Module, batch: Batch, outputs: Any, loss: Tensor) -> Tensor:
        """Return L of a batch of own examples, given the model's outputs for it and their loss."""
        chosen = self._next(min(len(batch.targets), len(self._said)))
        inputs = (tensor.to(self._said.device) for tensor in self._probe.batch(chosen).inputs)
        logits = logits_of(task, model(*inputs))
        assert logits is not None
        heat = self._temperature
        said = self._said[chosen.to(self._said.device)]
        gap = F.kl_div(F.log_softmax(logits.float() / heat, 1), said, reduction="batchmean")
        return (1 - self._weight) * loss + self._weight * heat**2 * gap

    def _next(self, count: int) -> Tensor:
        """Return the indices of the next examples; the set is gone through whole before any comes again."""
        while len(self._left) < count:
            self._left = torch.cat([self._left, torch.randperm(len(self._said), generator=self._generator)])
        chosen, self._left = self._left[:count], self._left[count:]
        return chosen


def probe_logits(
    task: Task, model: nn.Module, probe: Data, *, batch_size: int, precision: str, device: torch.device
) -> Tensor:
    """Return what a model says of a set: its logits in eval mode, (examples, classes) in float32 on the CPU. Neither
    its mode nor random streams are disturbed."""
    found: list[Tensor] = []
    streams = own_streams(seeded_streams(0, device), device)
    with eval_mode(model), streams, torch.no_grad(), task_errors(task, "the probe set's logits"):
        for start, stop in pairwise(batch_bounds(len(probe), batch_size)):
            inputs = (tensor.to(device) for tensor in probe.batch(torch.arange(start, stop)).inputs)
            with autocast(precision, device):
                logits = logits_of(task, model(*inputs))
            assert logits is not None
            found.append(logits.float().cpu())
    return torch.cat(found)
