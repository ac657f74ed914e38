"""Check of `dimat doctor`: how far agents' class shares lie apart, and advice for it.

Agents do not send each other their counts. If the configuration splits one data set among them, all parts are known
here; if each has its own data, only this agent's part is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dimat.agent.doctor.check import Check, ok, warn
from dimat.agent.setup.class_shares import FAR_APART, class_distance
from dimat.agent.setup.next_step import averages_exactly, exact_average
from dimat.agent.setup.prepare import PreparedAgent
from dimat.train.losses import SKEWED, class_counts, skew

AUTO = 'set train.loss = "auto" for all agents'


def check_classes(setup: PreparedAgent) -> Iterator[Check]:
    """Say how far class shares lie apart; nothing for a task without classes, or for an agent by itself."""
    experiment = setup.experiment
    data = experiment.task.data("train")
    if class_counts(experiment.task, data) is None or data.labels is None:
        return
    plain = setup.config.train.loss.name == "task"
    parts = {agent: experiment.part(agent) for agent in experiment.agents} if experiment.parts else {}
    classes = len(experiment.task.classes)
    counts = {agent: torch.bincount(data.labels[part], minlength=classes) for agent, part in parts.items()}
    apart = class_distance({agent: row.tolist() for agent, row in counts.items()})
    if apart is None:
        if not parts and len(setup.schedule.agents) > 1:
            yield _own_data(torch.bincount(data.labels, minlength=classes), plain=plain)
        return
    what = f"agents' class shares are {apart:.2f} from the whole's (total variation, mean over agents)"
    mends = [AUTO] if plain and any(skew(row) > SKEWED for row in counts.values()) else []
    method = setup.config.merge.preset
    averages = method.exchanges and method.shares == "weights"
    if apart > FAR_APART and averages and not averages_exactly(setup.schedule.first):
        what += f", above {FAR_APART}: an average over few neighbours lacks whole classes"
        mends.append(f"let all agents have exact averages: {exact_average(len(counts))}, if all can reach each other")
    yield warn("classes", what, "; ".join(mends)) if mends else ok("classes", what)


def _own_data(counts: torch.Tensor, *, plain: bool) -> Check:
    """Return the check of an agent with data of its own, which knows nobody else's counts."""
    away = skew(counts)
    what = f"this agent's class shares are {away:.2f} from equal ones (total variation); its peers' are not known here"
    return warn("classes", what, AUTO) if plain and away > SKEWED else ok("classes", what)
