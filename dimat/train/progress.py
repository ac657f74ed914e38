"""How far a round's training is, so that a trainer's state can hold its middle."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dimat.config import TrainConfig
from dimat.train.base import Value

DEFAULT_EPOCHS = 2.0
"""Of a round, where neither epochs nor steps are given."""


class TrainingInterruptedError(Exception):
    """Training was broken off between two steps of a round, as it was told to; the trainer's state goes on there."""


@dataclass(frozen=True, slots=True)
class Interrupts:
    """Breaks in a round's training, between two optimizer steps, in the thread that trains.

    `due`: whether there is to be one, asked after each step; `pause`: called then, may take the trainer's state, and
    returns whether training breaks off.
    """

    due: Callable[[], bool]
    pause: Callable[[], bool]


WHOLE = ("number", "steps", "batches", "done", "samples", "within", "first")
"""The whole numbers of a `Progress`."""


@dataclass(slots=True)
class Progress:
    """One round, of `steps` steps, of which `done` are over.

    `number`: the round's; `batches`: of an epoch; `loss`: sum over the steps, each by its weight; `counted`: sum of
    these weights (a batch's examples, or what the task's `loss_weight` says); `samples`: examples seen. Batches are
    gathered several at a time, and what is drawn for them (order, augmentation) is drawn for all at once: `within` of
    the batches gathered last are done, `first` is where they begin in the epoch, and `before` are the states of the
    random streams from before they were gathered, by which they are gathered again.
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
        """Return what a state keeps of it as tensors."""
        return {f"round/{name}": state.clone() for name, state in self.before.items()} if self.within else {}

    def values(self) -> dict[str, Value]:
        """Return what a state keeps of it as plain values."""
        return {f"round/{name}": getattr(self, name) for name in (*WHOLE, "loss", "counted")}

    @staticmethod
    def of(tensors: Mapping[str, Tensor], values: Mapping[str, Value]) -> Progress | None:
        """Return what a state holds; None where it is of the end of a round."""
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
