"""The next setting to try if merging did not pay, given an experiment's settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dimat.agent.setup.class_shares import FAR_APART, class_distance
from dimat.config import ExperimentConfig
from dimat.merge.registry import is_mean
from dimat.train.losses import SKEWED

if TYPE_CHECKING:
    from dimat.topology.network_map import Topology

FEW_ROUNDS = 10
"""Agents with starts of their own or skewed parts were behind training alone for two to three merges and well ahead
after ten (docs/results.md)."""
ADVISE = "let short probes choose: dimat advise experiment.toml"


def next_step(config: ExperimentConfig, histogram: Mapping[str, Sequence[int]], *, sparse: bool, exact: bool) -> str:
    """Return the setting to try next, the most promising first; "" if the method does not merge.

    `histogram`: samples by class of each agent, empty if not known; `sparse`: whether some agents are not
    linked to each other; `exact`: whether they average exactly (`averages_exactly`).
    """
    method, schedule, train = config.merge.preset, config.schedule, config.train
    if not method.exchanges:
        return ""
    apart = class_distance(histogram)
    if method.shares == "logits":  # nothing is averaged, so that starts and links matter less
        few = 0 < schedule.rounds < FEW_ROUNDS
        return f"more rounds: schedule.rounds = {3 * schedule.rounds}" if few else ADVISE
    if train.initialisation == "own" and schedule.first_merge == "align":
        return 'train.initialisation = "shared" (or, where models exist already, schedule.first_merge = "adopt-distil")'
    if train.loss.name == "task" and apart is not None and apart > SKEWED:
        return f'train.loss = "auto": class shares are {apart:.2f} from the whole\'s (total variation)'
    combine = config.merge.combine
    averaged = is_mean(method.combine if combine is None else combine.name)
    if config.optimizer_state == "kept" and averaged and not method.every_step:
        return 'train.optimizer_state = "merged"'
    if apart is not None and apart > FAR_APART and sparse and not exact:
        return f"an exact average, {exact_average(len(histogram))}: class shares are {apart:.2f} from the whole's"
    if sparse and not exact and schedule.mixing_steps == 1 and schedule.mode == "sync" and not method.every_step:
        return "schedule.mixing_steps = 3: three exchanges after each training"
    if 0 < schedule.rounds < FEW_ROUNDS:
        return f"more rounds: schedule.rounds = {3 * schedule.rounds}"
    return ADVISE


def exact_average(agents: int) -> str:
    """Return, as TOML text, settings with which all agents reach their exact average every few exchanges."""
    from dimat.topology.base_k import base_k_rounds  # networkx: not wanted by those who ask for less

    steps = len(base_k_rounds(agents, 1))
    return (
        f'topology.graph = "complete" with topology.schedule = "base-k" (at most one peer at a time, exact after '
        f"{steps} exchanges: schedule.mixing_steps = {steps} has one each round)"
    )


def averages_exactly(topology: Topology) -> bool:
    """Whether agents regularly hold the exact average of all: a Base-(k+1) schedule, or all linked to all."""
    if topology.schedule_config.name == "base-k":
        return True
    graph, count = topology.base, len(topology.names)
    return (
        topology.schedule_config.name == "static" and graph is not None and len(graph.edges) >= count * (count - 1) / 2
    )
