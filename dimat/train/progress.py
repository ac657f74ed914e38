"""The progress of a round's training, so that a trainer's state can be taken in its middle."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dimat.config import TrainConfig
from dimat.train.base import Value

DEFAULT_EPOCHS = 2.0
"""Epochs of a round, if neither epochs nor steps are given."""


class TrainingInterruptedError(Exception):
    """Training was interrupted between two steps of a round, as requested; the trainer's state continues there."""


@dataclass(frozen=True, slots=True)
class Interrupts:
    """Pauses in a round's training, between two optimizer steps, in the training thread.

    `due`: whether a pause is due, asked after each step; `pause`: called then, may take the trainer's state, and
    returns whether to interrupt training.
    """

    due: Callable[[], bool]
    pause: Callable[[], bool]


WHOLE = ("number", "steps", "batches", "done", "samples", "within", "first")
"""The whole numbers of a `Progress`."""


@dataclass(slots=True)
class Progress:
    """One round of `steps` steps, of which `done` are done.

    `number`: the round's; `batches`: of an epoch; `loss`: weighted sum over the steps; `counted`: sum of these weights
    (a batch's examples, or the task's `loss_weight`); `samples`: examples seen. Batches are gathered several at a time,
    and their random draws (order, augmentation) are made for all at once: `within` of the batches gathered last are
    done, `first` is their position in the epoch, and `before` holds the states of the random streams from before they
    were gathered, with which they can be gathered again.
    """

    number: int
    steps: int
    batches: int
    done: int = 0
    loss: float = 0.0
    counted: float = 0.0
    samples: int = 0
    within: int = 0
    first: int = 0
    before: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def tensors(self) -> dict[str, Tensor]:
        """Return its part of a trainer's state as tensors."""
        return {f"round/{name}": state.clone() for name, state in self.before.items()} if self.within else {}

    def values(self) -> dict[str, Value]:
        """Return its part of a trainer's state as plain values."""
        return {f"round/{name}": getattr(self, name) for name in (*WHOLE, "loss", "counted")}

    @staticmethod
    def of(tensors: Mapping[str, Tensor], values: Mapping[str, Value]) -> Progress | None:
        """Return the progress in a trainer's state; None if the state is of the end of a round."""
        if "round/steps" not in values:
            return None
        before = {n.removeprefix("round/"): t.clone() for n, t in tensors.items() if n.startswith("round/")}
        whole = {name: int(values[f"round/{name}"]) for name in WHOLE}
        counted = float(values.get("round/counted", whole["samples"]))
        return Progress(**whole, loss=float(values["round/loss"]), counted=counted, before=before)


def round_steps(config: TrainConfig, batches: int, round: int) -> int:
    """Return the optimizer steps of a round (from 1) of an agent with `batches` batches in an epoch."""
    if round == 1 and config.first_round_epochs is not None:
        epochs = config.first_round_epochs
    elif config.steps_per_round is not None:
        return config.steps_per_round
    else:
        epochs = config.epochs_per_round or DEFAULT_EPOCHS
    return max(1, math.floor(epochs * batches + 0.5))
