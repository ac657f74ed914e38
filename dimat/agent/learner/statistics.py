"""Statistics for merge methods that need them, taken on an agent's own data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from dimat.errors import ConfigError, DimatError
from dimat.merge import MergePlan
from dimat.merge.stages import Inputs
from dimat.seeds import torch_generator
from dimat.tasks.base import Data, Task
from dimat.tasks.data import batch_bounds


def take_statistics(
    plan: MergePlan, task: Task, model: nn.Module, data: Data, batch_size: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the statistics that merges by the plan rest on, at the model's weights, on the CPU.

    Empty where they rest on none.

    Taken on `statistics_samples` examples of `data` at most, drawn with the generator and not augmented, with the
    task's loss. Equal weights, data and draws give equal bits. Raises MergeError where a value is not finite.
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
    """Return a merge method's statistics, of two examples: only names and shapes count.

    ConfigError where the method finds none in this model, or the task's loss or model cannot be used for it.
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
            f"{asked_by}: its statistics cannot be taken of task {task.name}: "
            f"{type(error).__name__}: {first}; choose another method"
        ) from error
    if not found:
        raise ConfigError(
            f"{asked_by} finds nothing to take statistics of in the model of task {task.name}; choose another method"
        )
    return found
