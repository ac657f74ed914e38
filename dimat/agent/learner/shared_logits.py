"""The logits that an agent exchanges in place of weights, and how it learns from its peers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from dimat.agent.learner.example_sets import ExampleSets
from dimat.agent.learner.merge_metrics import MergeMetrics
from dimat.agent.learner.shared_tokens import NOT_FINITE, TokenExchange, token_layout
from dimat.agent.protocol.messages import MergeAction
from dimat.errors import ConfigError, DimatError, MergeError
from dimat.events import MergeResult
from dimat.merge import MergePlan
from dimat.merge.shared_logits import HEAT, LOGITS, LogitLayout
from dimat.merge.stages import StageTimer
from dimat.merge.token_logits import TokenLayout
from dimat.symmetry.trace import eval_mode
from dimat.tasks.base import Data, Task
from dimat.train.base import ModelTrainer
from dimat.train.contract import task_errors
from dimat.train.lesson import ProbeLesson, Teaches, check_teachable, logits_of, probe_logits
from dimat.train.token_lesson import check_teachable_by_text, text_of
from dimat.train.trainer import Trainer
from dimat.weights.header import LONGEST_HEADER
from dimat.weights.tensors import Tensors, open_tensors


def layout_of(plan: MergePlan, task: Task, model: nn.Module) -> LogitLayout | TokenLayout:
    """Return the layout of the logits that agents exchange. ConfigError where the task's model has none."""
    key, keep = f'merge.combine = "{plan.combine.name}"', cast("int | None", plan.combine.settings["keep"])
    examples = min(plan.probe_samples, len(task.data("probe")))
    if (text := text_of(task)) is not None:
        check_teachable_by_text(task, key)
        return token_layout(text, examples, keep)
    check_teachable(task, key)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    inputs = tuple(tensor.to(device) for tensor in task.example_inputs())
    with eval_mode(model), torch.no_grad(), task_errors(task, "the model's logits"):
        logits = logits_of(task, model(*inputs))
    assert logits is not None
    return LogitLayout(examples, logits.shape[-1], keep)


class Exchange(Protocol):
    """One kind of logits: what is sent, how a peer's is read, what is learned from them together."""

    def tensors(self) -> dict[str, Tensor]: ...

    def read(self, peer: str, snapshot: Tensors) -> Any: ...

    def lesson(
        self, heard: Mapping[str, Any], weights: Sequence[float], order: torch.Generator
    ) -> tuple[Teaches | None, tuple[str, ...]]: ...


@dataclass(frozen=True, slots=True)
class ClassExchange:
    """The logits over classes of one agent's model on the probe set."""

    plan: MergePlan
    trainer: Trainer
    probe: Data
    layout: LogitLayout

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a snapshot of the model as it is."""
        trainer = self.trainer
        size, precision = trainer.config.eval_batch_size, trainer.config.precision
        logits = probe_logits(
            trainer.task, trainer.model, self.probe, batch_size=size, precision=precision, device=trainer.device
        )
        return self.layout.encoded(logits)

    def read(self, peer: str, snapshot: Tensors) -> dict[str, Tensor]:
        """Return a peer's snapshot, checked (`LogitLayout.read`)."""
        return self.layout.read(peer, snapshot)

    def lesson(
        self, heard: Mapping[str, Mapping[str, Tensor]], weights: Sequence[float], order: torch.Generator
    ) -> tuple[ProbeLesson, tuple[str, ...]]:
        """Return what own model and peers teach together, by mixing weights, own first. MergeError where own logits are
        not finite."""
        combine = self.plan.combine
        settings: Mapping[str, Any] = combine.settings
        own = self.tensors()
        if not bool(own[LOGITS].isfinite().all()):
            raise MergeError(NOT_FINITE)
        said = combine(own, list(heard.values()), weights, self.layout.classes)
        said = said.to(self.trainer.device)
        heat = HEAT if settings["temperature"] is None else settings["temperature"]
        return ProbeLesson(self.probe, said, settings["weight"], heat, order), ()


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
        self._training = training
        layout, probe, text = layout_of(plan, trainer.task, trainer.model), sets.probe(), text_of(trainer.task)
        self.schema = layout.schema
        """The hash of what is the same in all agents' snapshots."""
        self._exchange: Exchange
        if isinstance(layout, LogitLayout):
            self._exchange = ClassExchange(plan, trainer, probe, layout)
        else:
            assert text is not None
            self._exchange = TokenExchange.of(trainer, probe, text, plan.combine.settings)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a snapshot of the model as it is."""
        return self._exchange.tensors()

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
        heard: dict[str, Any] = {}
        weights = [action.own_weight]
        for part in action.parts:
            try:
                with open_tensors(sources[part.peer], "", LONGEST_HEADER) as snapshot:
                    found = self._exchange.read(part.peer, snapshot)
            except DimatError as error:
                refused[part.peer] = str(error)
                weights[0] += part.weight
                continue
            if part.weight > 0:
                heard[part.peer] = found
                weights.append(part.weight)
        timer.lap("merge")
        lesson, notes = self._exchange.lesson(heard, weights, order) if heard else (None, ())
        timer.lap("merge")
        if lesson is not None:
            with self._training():
                self._trainer.learn(number, lesson, self._plan.combine.settings["steps"])
            timer.lap("train")
        metrics.take_after(changed=lesson is not None)
        timer.lap("evaluate")
        return MergeResult(
            refused=refused, accepted=1.0, before=metrics.before, after=metrics.after, notes=notes, cpu_s=timer.seconds
        )
