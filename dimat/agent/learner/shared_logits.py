"""The logits that an agent exchanges in place of weights, and how it learns from its peers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dimat.agent.learner.example_sets import ExampleSets
from dimat.agent.learner.merge_metrics import MergeMetrics
from dimat.agent.protocol.messages import MergeAction
from dimat.errors import ConfigError, DimatError, MergeError
from dimat.events import MergeResult
from dimat.merge import MergePlan
from dimat.merge.shared_logits import LOGITS, LogitLayout
from dimat.merge.stages import StageTimer
from dimat.symmetry.trace import eval_mode
from dimat.tasks.base import Task
from dimat.train.base import ModelTrainer
from dimat.train.contract import task_errors
from dimat.train.lesson import ProbeLesson, check_teachable, logits_of, probe_logits
from dimat.train.trainer import Trainer
from dimat.weights.header import LONGEST_HEADER
from dimat.weights.tensors import open_tensors


def layout_of(plan: MergePlan, task: Task, model: nn.Module) -> LogitLayout:
    """Return the layout of the logits that agents exchange. ConfigError where the task's model has none."""
    check_teachable(task, f'merge.combine = "{plan.combine.name}"')
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    inputs = tuple(tensor.to(device) for tensor in task.example_inputs())
    with eval_mode(model), torch.no_grad(), task_errors(task, "the model's logits"):
        logits = logits_of(task, model(*inputs))
    assert logits is not None
    examples = min(plan.probe_samples, len(task.data("probe")))
    return LogitLayout(examples, logits.shape[-1], cast("int | None", plan.combine.settings["keep"]))


class SharedLogits:
    """The logits of one agent's model on the probe set. `training`: a context in which its own training is followed.

    Raises ConfigError where the model is trained by a loop of the user's own, or cannot be taught by logits.
    """

    def __init__(
        self,
        plan: MergePlan,
        sets: ExampleSets,
        trainer: ModelTrainer,
        training: Callable[[], AbstractContextManager[None]],
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise ConfigError(
                f'merge.combine = "{plan.combine.name}" trains by itself, and here a loop of your own does; '
                "use a method that merges weights"
            )
        self._plan = plan
        self._trainer = trainer
        self._probe = sets.probe()
        self._training = training
        self._layout = layout_of(plan, trainer.task, trainer.model)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a snapshot of the model as it is."""
        trainer = self._trainer
        size, precision = trainer.config.eval_batch_size, trainer.config.precision
        logits = probe_logits(
            trainer.task, trainer.model, self._probe, batch_size=size, precision=precision, device=trainer.device
        )
        return self._layout.encoded(logits)

    def merge(
        self,
        action: MergeAction,
        number: int,
        sources: Mapping[str, Path],
        metrics: MergeMetrics,
        timer: StageTimer,
        order: torch.Generator,
    ) -> MergeResult:
        """Learn from what peers say of the probe set, in the place of a merge of weights.

        `number`: the round that the exchange belongs to; `order`: draws that of the probe examples. A peer whose logits
        do not pass the check teaches nothing, and its mixing weight goes to self; with weight 1 on self nothing is
        trained. MergeError where own logits are not finite.
        """
        refused: dict[str, str] = {}
        heard: list[Mapping[str, Tensor]] = []
        weights = [action.own_weight]
        for part in action.parts:
            try:
                with open_tensors(sources[part.peer], "", LONGEST_HEADER) as snapshot:
                    found = self._layout.read(part.peer, snapshot)
            except DimatError as error:
                refused[part.peer] = str(error)
                weights[0] += part.weight
                continue
            if part.weight > 0:
                heard.append(found)
                weights.append(part.weight)
        timer.lap("merge")
        if heard:
            self._learn(number, heard, weights, order)
            timer.lap("train")
        metrics.take_after(changed=bool(heard))
        timer.lap("evaluate")
        return MergeResult(
            refused=refused, accepted=1.0, before=metrics.before, after=metrics.after, notes=(), cpu_s=timer.seconds
        )

    def _learn(
        self, number: int, heard: Sequence[Mapping[str, Tensor]], weights: Sequence[float], order: torch.Generator
    ) -> None:
        """Train on what own and peers' logits say together."""
        own = self.tensors()
        if not bool(own[LOGITS].isfinite().all()):
            raise MergeError("own logits on the probe set are not finite; lower train.optimizer.lr")
        combine = self._plan.combine
        settings: Mapping[str, Any] = combine.settings
        said = combine(own, heard, weights, self._layout.classes)
        lesson = ProbeLesson(
            self._probe, said.to(self._trainer.device), settings["weight"], settings["temperature"], order
        )
        with self._training():
            self._trainer.learn(number, lesson, settings["steps"])
