"""Distillation from several models at once: their knowledge, into other weights.

    L = (1 − w) · loss(z, y) + w · T² · KL(softmax(z̄ / T) ‖ softmax(z / T))

z are the model's logits for a batch of an agent's own examples, z̄ the mean of the teachers' for the same inputs, in
whatever order of units each of them is; loss is that of `train.loss`. Hinton et al. 2015, arXiv 1503.02531.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dimat.config import DistilConfig
from dimat.errors import ConfigError
from dimat.merge.models.functional import call_with
from dimat.symmetry.trace import eval_mode
from dimat.tasks.base import Batch, Task
from dimat.train.losses import divergence, logits_of


def check_teachable(task: Task, key: str) -> None:
    """Raise ConfigError, naming the setting `key`, if a task's model cannot be distilled from logits."""
    if getattr(task, "train_step", None) is not None:
        raise ConfigError(f"{key} teaches by logits, and task {task.name} has a train_step of its own")
    if getattr(task, "logits", None) is None:
        raise ConfigError(
            f"{key} teaches by logits over classes, and task {task.name} does not say that it has any (`logits`)"
        )


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
