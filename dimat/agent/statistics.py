"""The statistics that some combine methods rest on, as an agent takes them: on its own data, after training."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from dimat.merge import MergePlan
from dimat.merge.stages import Inputs
from dimat.task import Data, Task
from dimat.tasks.data import batch_bounds


def take_statistics(
    plan: MergePlan, task: Task, model: nn.Module, data: Data, batch_size: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the statistics of the plan's combine method at the model's weights, on the CPU; empty where it has none.

    Taken on `statistics_samples` examples of `data` at most, drawn with the generator and not augmented, with the
    task's loss. Equal weights, data and draws give equal bits. Raises MergeError where a value is not finite.
    """
    if plan.statistics is None:
        return {}
    order = torch.randperm(len(data), generator=generator)[: plan.statistics_samples]

    def examples() -> Iterator[tuple[Inputs, Tensor]]:
        for start, stop in pairwise(batch_bounds(len(order), batch_size)):
            batch = data.batch(order[start:stop])
            yield batch.inputs, batch.targets

    found = plan.statistics(model, examples(), loss=task.loss)
    return {name: tensor.cpu() for name, tensor in found.items()}
