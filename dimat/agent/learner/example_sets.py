"""An agent's sets of examples: to train on, to judge merges on, to compare networks on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dimat.errors import DataError
from dimat.merge import MergePlan, needs_symmetry
from dimat.seeds import torch_generator
from dimat.tasks import Subset
from dimat.tasks.base import Data, Task

HOLD_OUT = 0.1  # share of an agent's samples that `accept = no-worse` on "local" keeps from training


@dataclass(frozen=True, slots=True)
class ExampleSets:
    """The sets of one agent, of a task and for merges by a plan.

    `own`: the samples that the agent trains on; `hold_out`: those on which its merges are judged instead, None if
    they are not judged on its own samples.
    """

    task: Task
    plan: MergePlan
    own: Data
    hold_out: Data | None

    @staticmethod
    def of(task: Task, plan: MergePlan, agent: str, indices: Tensor, seed: int) -> ExampleSets:
        """Return the sets of the agent that has the samples `indices` of the training split; `seed`: the experiment's.

        Raises DataError if one of them is too small for its use.
        """
        train, held = task.data("train"), None
        if plan.judges and plan.accept.settings.get("on") == "local":
            order = torch.randperm(len(indices), generator=torch_generator(seed, "hold-out", agent))
            cut = max(1, int(len(indices) * HOLD_OUT))
            held = Subset(train, indices[order[:cut]])
            indices = indices[order[cut:]]
        sets = ExampleSets(task, plan, Subset(train, indices), held)
        sets.check(agent)
        return sets

    def check(self, agent: str) -> None:
        """Raise DataError if a set is too small for its use."""
        plan = self.plan
        if self.hold_out is not None and len(self.own) == 0:
            raise DataError(
                f'agent {agent} has {len(self.hold_out)} example, which accept = "no-worse" on "local" keeps out of '
                "training; give it more data, or judge merges on the probe set"
            )
        if (needs_symmetry(plan) or plan.repairs) and (count := len(self.compared())) < 2:
            what = "the probe set" if plan.align_data == "probe" else f"the data of agent {agent}"
            raise DataError(
                f"{what} has fewer than the two examples ({count}) that comparing networks or re-estimating BatchNorm "
                'takes; give more, or set merge.align_data to "local" or "probe", whichever has them'
            )
        if plan.shares == "logits" and (count := len(self.probe())) < 2:
            raise DataError(
                f'the probe set has fewer than two examples ({count}), and merge.combine = "{plan.combine.name}" '
                "learns from what peers say of it; give more"
            )
        if (judged := self.judged()) is not None and len(judged) == 0:
            raise DataError("the probe set is empty, and merges are judged on it; give examples")

    def compared(self) -> Data:
        """Return the examples on which networks are compared and BatchNorm is re-estimated."""
        if self.plan.align_data == "local":
            return self.own
        if self.plan.align_data == "pooled":
            return self.task.data("train")
        return self.probe()

    def judged(self) -> Data | None:
        """Return the examples on which merges are judged by the task's metric, None if they are not judged."""
        objective = self.plan.combine.settings.get("objective")  # a combine method may judge by score too
        if not self.plan.judges and objective != "score":
            return None
        return self.hold_out if self.hold_out is not None else self.probe()

    def probe(self) -> Data:
        """Return the probe set: so many examples of the task's, all of it where it has fewer."""
        probe = self.task.data("probe")
        return Subset(probe, torch.arange(min(self.plan.probe_samples, len(probe))))
