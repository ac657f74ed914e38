"""Statistics for merge methods that need them, computed on an agent's own data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from dimat.errors import ConfigError, DimatError
from dimat.merge import MergePlan, Permutations
from dimat.merge.shared_statistics import permuted
from dimat.merge.stages import Inputs, Weights
from dimat.seeds import torch_generator
from dimat.symmetry import SymmetrySpec
from dimat.tasks.base import Data, Task
from dimat.tasks.data import batch_bounds


class OwnStatistics:
    """The statistics for an agent's next merge, from the end of training to the merge.

    `data`: the agent's own; `tensors`: at its weights and in their basis, empty if merges need none.
    """

    def __init__(self, task: Task, data: Data, batch_size: int) -> None:
        self._task = task
        self._data = data
        self._batch_size = batch_size
        self.tensors: dict[str, Tensor] = {}

    def take(self, plan: MergePlan, model: nn.Module, generator: torch.Generator) -> None:
        """Compute those of the plan of the next merge at the model's weights (see `take_statistics`)."""
        self.tensors = take_statistics(plan, self._task, model, self._data, self._batch_size, generator)

    def adopt(self, tensors: Weights) -> None:
        """Continue with those of another agent, whose weights are adopted."""
        self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    def permute(self, spec: SymmetrySpec, permutations: Permutations) -> None:
        """Permute them into the basis of the permuted weights."""
        self.tensors = dict(permuted(self.tensors, spec, permutations))

    def forget(self) -> None:
        """Drop them: the weights at which they were computed have changed."""
        self.tensors = {}


def take_statistics(
    plan: MergePlan, task: Task, model: nn.Module, data: Data, batch_size: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the statistics that merges by the plan need, at the model's weights, on the CPU.

    Empty if they need none.

    Computed on at most `statistics_samples` examples of `data`, drawn with the generator and not augmented, with the
    task's loss. Equal weights, data and draws give equal bits. Raises MergeError if a value is not finite.
    """
    if not plan.statistics:
        return {}
    order = torch.randperm(len(data), generator=generator)[: plan.statistics_samples]

    def examples() -> Iterator[tuple[Inputs, Tensor]]:
        for start, stop in pairwise(batch_bounds(len(order), batch_size)):
            batch = data.batch(order[start:stop])
            yield batch.inputs, batch.targets

    taken: dict[str, Tensor] = {}
    for each in plan.statistics:
        try:
            found = each.take(model, examples(), loss=task.loss)
        except ConfigError as error:
            raise ConfigError(f"{each.asked_by} and task {task.name}: {error}") from error
        taken |= {name: tensor.cpu() for name, tensor in found.items()}
    return taken


def sample_statistics(plan: MergePlan, task: Task, model: nn.Module) -> dict[str, Tensor]:
    """Return a merge method's statistics of two examples, for their names and shapes.

    Raises ConfigError if the method finds none in this model, or cannot use the task's loss or model.
    """
    if not plan.statistics:
        return {}
    asked_by = " and ".join(each.asked_by for each in plan.statistics)
    few = replace(plan, statistics_samples=2)
    try:
        found = take_statistics(few, task, model, task.data("train"), 2, torch_generator(0, "statistics"))
    except DimatError:
        raise
    except Exception as error:  # a user's loss may do what cannot be differentiated example by example
        first = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"{asked_by}: its statistics cannot be computed for task {task.name}: "
            f"{type(error).__name__}: {first}; choose another method"
        ) from error
    if not found:
        raise ConfigError(
            f"{asked_by} finds no layer in the model of task {task.name} to compute "
            "statistics of; choose another method"
        )
    return found
