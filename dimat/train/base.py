"""The interface between a trainer and its learner: members, a round's report, state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dimat.symmetry import Permutations, SymmetrySpec
from dimat.tasks.base import Data
from dimat.tasks.data import InputBatches

Value = int | float | str


@dataclass(frozen=True, slots=True)
class TrainReport:
    """One round's training. `loss`: mean over the examples seen; `samples`: how many (with repeats);
    `cpu_s`, `wall_s`: seconds of this process."""

    loss: float
    samples: int
    steps: int
    cpu_s: float
    wall_s: float


@dataclass(frozen=True, slots=True)
class TrainerState:
    """The state with which a trainer continues bit for bit.

    `tensors`: on the CPU, named `model/<name>`, `optimizer/<parameter>/<entry>` and `rng/<stream>` (uint8), in the
    middle of a round also `round/<stream>`, `teacher/<name>` and `anchor/<name>`; `values`: plain numbers and strings.
    Both are flat, ready for safetensors and JSON.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Value]


class ModelTrainer(Protocol):
    """Trains one agent's model: a `Trainer`, or the user's own loop. Its members are those of `Trainer`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def batches(self) -> int: ...
    def train(self, round: int) -> TrainReport: ...
    def evaluate(self, data: Data, weights: Mapping[str, Tensor] | None = None) -> dict[str, float]: ...
    def input_batches(self, data: Data, batch_size: int, generator: torch.Generator | None = None) -> InputBatches: ...
    def weights(self, *, copy: bool = True) -> dict[str, Tensor]: ...
    def exchange_weights(self, weights: dict[str, Tensor]) -> None: ...
    def load_weights(self, weights: Mapping[str, Tensor]) -> None: ...
    def start_from(self, weights: Mapping[str, Tensor]) -> None: ...
    def permute(self, spec: SymmetrySpec, permutations: Permutations) -> str: ...
    def optimizers(self) -> list[torch.optim.Optimizer]: ...
    def moments(self) -> dict[str, Tensor]: ...
    def load_moments(self, moments: Mapping[str, Tensor]) -> None: ...
    def adopt_moments(self, moments: Mapping[str, Tensor]) -> list[str]: ...
    def momentum_limit(self) -> float: ...
    def state(self, *, copy: bool = True) -> TrainerState: ...
    def load_state(self, state: TrainerState) -> None: ...


Training = Callable[[ModelTrainer], TrainReport]
"""A round's training of a trainer's model."""
