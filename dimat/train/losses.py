"""Losses of local training: the task's own, or one that corrects for skewed classes.

An agent that holds few images of a class learns to predict it rarely, and an average of such agents inherits that. The
losses here correct the training on the agent's own examples; evaluation always uses plain logits.

They are for tasks whose model returns logits over classes and whose targets are class indices: those have a method
`logits(outputs) -> Tensor`, (B, classes), and their `loss` accepts such logits instead of the outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dimat.config.tree import NamedConfig
from dimat.errors import ConfigError
from dimat.registry import Bound, Registry
from dimat.tasks.base import Data, Task

SKEWED = 0.15
"""Total variation between an agent's class shares and the reference above which "auto" is logit-adjusted.

A hundred examples drawn evenly from ten classes are at 0.12 on average; Dirichlet 0.5 parts are at about 0.4.
"""

Plain = Callable[[Tensor], Tensor]
"""The task's loss as a function of the logits."""

LOSSES: Registry[Tensor] = Registry(
    "training loss", context=frozenset({"counts", "teacher"}), traits={"teacher": False, "classes": True}
)


@LOSSES.register("task", classes=False)
def task(plain: Plain, logits: Tensor, targets: Tensor) -> Tensor:
    """The task's own loss."""
    return plain(logits)


@LOSSES.register("auto", classes=False)
def auto(plain: Plain, logits: Tensor, targets: Tensor) -> Tensor:
    """ "logit-adjusted" for an agent whose class shares are far from those of all data, else "task"."""
    raise AssertionError("an agent's own loss is chosen from its data (LocalLoss.of)")


@LOSSES.register("logit-adjusted")
def logit_adjusted(
    plain: Plain,
    logits: Tensor,
    targets: Tensor,
    *,
    counts: Tensor,
    tau: Annotated[float, Field(ge=0)] = 1.0,
    epsilon: Annotated[float, Field(gt=0, le=1)] = 0.01,
) -> Tensor:
    """The loss of logits + τ log π, π = (1 − ε) own class shares + ε/C.

    Training then corrects for the agent's own shares, and the plain logits are those for equal shares. Menon et al.
    2021, arXiv 2007.07314, eq. 10.
    """
    shares = (1 - epsilon) * counts / counts.sum() + epsilon / len(counts)
    return plain(logits + tau * shares.log())


@LOSSES.register("calibrated")
def calibrated(
    plain: Plain,
    logits: Tensor,
    targets: Tensor,
    *,
    counts: Tensor,
    tau: Annotated[float, Field(ge=0)] = 1.0,
    smoothing: Annotated[float, Field(gt=0)] = 1.0,
) -> Tensor:
    """The loss of logits − τ n_c^(−1/4), n_c the agent's examples of class c plus `smoothing` (FedLC).

    Zhang et al. 2022, arXiv 2209.00189, eq. 7.
    """
    return plain(logits - tau * (counts + smoothing) ** -0.25)


@LOSSES.register("restricted")
def restricted(
    plain: Plain, logits: Tensor, targets: Tensor, *, counts: Tensor, scale: Annotated[float, Field(ge=0, le=1)] = 0.5
) -> Tensor:
    """The loss of logits whose classes the agent does not hold are scaled (restricted softmax, FedRS).

    Li & Zhan 2021, KDD, "FedRS: Federated Learning with Restricted Softmax for Label Distribution Non-IID Data".
    """
    return plain(torch.where(counts > 0, logits, scale * logits))


@LOSSES.register("distillation", teacher=True, classes=False)
def distillation(
    plain: Plain,
    logits: Tensor,
    targets: Tensor,
    *,
    teacher: Tensor,
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5,
    temperature: Annotated[float, Field(gt=0)] = 1.0,
) -> Tensor:
    """(1 − w) the task's loss + w T² KL(teacher ‖ model) at temperature T; the teacher is the round's merged model.

    Hinton et al. 2015, arXiv 1503.02531.
    """
    gap = divergence(logits / temperature, teacher / temperature)
    return (1 - weight) * plain(logits) + weight * temperature**2 * gap


@LOSSES.register("not-true-distillation", teacher=True, classes=False)
def not_true_distillation(
    plain: Plain,
    logits: Tensor,
    targets: Tensor,
    *,
    teacher: Tensor,
    weight: Annotated[float, Field(ge=0)] = 1.0,
    temperature: Annotated[float, Field(gt=0)] = 1.0,
) -> Tensor:
    """The task's loss + β KL(teacher ‖ model) over all classes but the true one (FedNTD), at temperature T.

    Lee et al. 2022, arXiv 2106.03097, eq. 5; the teacher is the round's merged model.
    """
    others = ~F.one_hot(targets, logits.shape[1]).bool()
    rest, known = (x[others].view(len(x), -1) / temperature for x in (logits, teacher))
    return plain(logits) + weight * divergence(rest, known)


def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean KL(teacher ‖ model) over a batch."""
    said, meant = F.log_softmax(logits, 1), F.log_softmax(teacher, 1)
    return F.kl_div(said, meant, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class LocalLoss:
    """The loss of one agent's training. `note`: a message about it, empty if it is the task's own."""

    _task: Task
    _loss: Bound[Tensor]
    _counts: Tensor | None
    note: str = ""

    @property
    def teaches(self) -> bool:
        """Whether it needs the outputs of a teacher: the model as it was when the round began."""
        return self._loss.traits["teacher"]

    @classmethod
    def of(cls, config: NamedConfig, task: Task, data: Data, reference: Tensor | None = None) -> LocalLoss:
        """Return the loss of a configuration for an agent's part of the data.

        "auto" is logit-adjusted if the part's class shares differ from the `reference` (shares by class; equal ones by
        default) by more than `SKEWED`, else the task's own. ConfigError if a loss does not suit the task.
        """
        counts = class_counts(task, data)
        loss = LOSSES.bind(config.name, config.options)
        if config.name != "auto":
            if config.name != "task":
                _check(config.name, loss, task, counts)
            return cls(task, loss, counts)
        own_step = getattr(task, "train_step", None) is not None
        away = 0.0 if counts is None or own_step else skew(counts, reference)
        if away <= SKEWED:
            return cls(task, LOSSES.bind("task", {}), counts)
        note = (
            f"this agent's class shares are {away:.2f} from the whole's (total variation): its loss is logit-adjusted; "
            'train.loss = "task" keeps the plain one'
        )
        return cls(task, LOSSES.bind("logit-adjusted", {}), counts, note)

    def __call__(self, outputs: Any, targets: Tensor, teacher: Any = None) -> Tensor:
        """Return the mean loss of a batch. `teacher`: the teacher's outputs for it, if there already is a teacher."""
        if self._loss.name == "task" or (self.teaches and teacher is None):
            return self._task.loss(outputs, targets)
        logits = logits_of(self._task, outputs)
        assert logits is not None
        context: dict[str, Any] = {}
        if self._counts is not None:
            context["counts"] = self._counts.to(logits.device, torch.float32)
        if teacher is not None:
            context["teacher"] = logits_of(self._task, teacher)

        def plain(changed: Tensor) -> Tensor:
            return self._task.loss(changed, targets)

        return self._loss(plain, logits, targets, **context)


def logits_of(task: Task, outputs: Any) -> Tensor | None:
    """Return the logits (B, classes) in a model's outputs, None if the task does not declare any."""
    logits: Any = getattr(task, "logits", None)
    return None if logits is None else logits(outputs)


def class_counts(task: Task, data: Data) -> Tensor | None:
    """Return the number of examples of each class in `data`, (classes,) int64; None if the task has no logits over
    classes."""
    labels = data.labels
    if getattr(task, "logits", None) is None or labels is None or len(task.classes) < 2 or labels.numel() == 0:
        return None
    if labels.is_floating_point() or labels.ndim != 1:
        return None
    if int(labels.min()) < 0 or int(labels.max()) >= len(task.classes):
        return None
    return torch.bincount(labels, minlength=len(task.classes))


def skew(counts: Tensor, reference: Tensor | None = None) -> float:
    """Return the total variation between class shares and reference shares (equal ones if None), in [0, 1]."""
    shares = counts.double() / counts.sum()
    goal = torch.full_like(shares, 1 / len(shares)) if reference is None else reference.double() / reference.sum()
    return float((shares - goal).abs().sum() / 2)


def _check(name: str, loss: Bound[Tensor], task: Task, counts: Tensor | None) -> None:
    if getattr(task, "train_step", None) is not None:
        raise ConfigError(
            f'train.loss = "{name}" and task {task.name}: it computes the loss in a train_step of its own; leave '
            "train.loss out, or use the loss there"
        )
    if getattr(task, "logits", None) is None or (counts is None and loss.traits["classes"]):
        raise ConfigError(
            f'train.loss = "{name}" is for classification: task {task.name} has no logits over classes with class '
            "indices as labels; leave train.loss out"
        )
