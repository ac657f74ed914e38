"""The simulator's side of a worker process: the agents that live in it, by key, and what can be asked of them.

Imported by the clean server process from which workers are forked, so that torch is loaded once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from blake3 import blake3

from dimat.agent.learner.checkpoint import CheckpointStore, Stored, read_state, write_state
from dimat.agent.learner.learner import Learner, MergeReport, TrainedReport
from dimat.agent.learner.shared_base import plan_for
from dimat.agent.protocol.messages import Moves
from dimat.agent.protocol.state import MachineState
from dimat.agent.setup.loaded_task import kit_for
from dimat.config import ExperimentConfig
from dimat.merge import needs_symmetry, plan_merge
from dimat.train.trainer import TrainerState
from dimat.weights.snapshot import make_folder


@dataclass(frozen=True, slots=True)
class Setup:
    """What a worker needs to make an agent. `store`: folder in which it alone records its snapshots; `warm`: folder in
    which first rounds of training are kept and found; `checkpoints`: folder of the agent's checkpoints, None where it
    needs none."""

    key: str
    agent: str
    config: ExperimentConfig
    indices: torch.Tensor
    store: Path
    warm: Path | None
    checkpoints: Path | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """An agent that was set up. `batches`: in an epoch of its data; `warnings` of its symmetry derivation."""

    batches: int
    warnings: tuple[str, ...]


_agents: dict[str, tuple[Learner, Setup]] = {}


def create(setup: Setup) -> Made:
    """Make an agent in this process."""
    make_folder(setup.store)
    symmetry = needs_symmetry(plan_for(setup.config.merge, kit_for(setup.config, symmetry=False).task))
    kit = kit_for(setup.config, symmetry=symmetry)
    spec = kit.spec if symmetry else None
    agent = Learner(
        setup.agent,
        setup.config,
        kit.task,
        setup.indices,
        setup.store,
        spec,
        durable=False,
        observers=kit.observers,
    )
    _agents[setup.key] = (agent, setup)
    return Made(agent.trainer.batches, spec.warnings if spec is not None else ())


def restore(setup: Setup) -> tuple[MachineState, int] | None:
    """Make an agent anew from its newest checkpoint; return the round machine's state and the last round published."""
    create(setup)
    agent = _agents[setup.key][0]
    found = _store(setup).newest(setup.config.run, setup.agent, agent.schema()) if setup.checkpoints else None
    if found is None:
        return None
    agent.restore(found.checkpoint)
    return found.checkpoint.machine, found.published


def checkpoint(key: str, machine: MachineState) -> float:
    """Write an agent's checkpoint; return the CPU-seconds that it took."""
    start = time.thread_time()
    agent, setup = _agents[key]
    if setup.checkpoints is not None:
        _store(setup).save(agent.checkpoint(machine))
    return time.thread_time() - start


def take_over(key: str, peer: str, snapshot: Path) -> str:
    """Let an agent take over a peer's weights; return why it could not, or an empty string."""
    return _agents[key][0].take_over(peer, snapshot)


def train(key: str, number: int, learn: bool) -> TrainedReport:
    """Train an agent; the first round is taken from the warm folder if an equal one was trained before."""
    agent, setup = _agents[key]
    if number != 1 or not learn or setup.warm is None:
        return agent.train(number, learn)
    file = setup.warm / f"{_first_round_key(setup)}.safetensors"
    if file.exists():
        kept = read_state(file)
        values = dict(kept.values)
        loss, samples = float(values.pop("report/loss")), int(values.pop("report/samples"))
        agent.trainer.load_state(TrainerState(dict(kept.tensors), values))
        report = agent.train(number, learn=False)
        return replace(report, loss=loss, samples=samples, train_s=0.0)
    report = agent.train(number, learn)
    state = agent.trainer.state()
    values = {**state.values, "report/loss": report.loss, "report/samples": report.samples}
    write_state(file, Stored(state.tensors, values), durable=False)
    return report


def adopt(key: str, number: int, peer: str, snapshot: Path) -> Moves | None:
    """Bring an agent into the basis of a peer's snapshot; return which units moved, None if it cannot."""
    return _agents[key][0].adopt(number, peer, snapshot)


def merge(
    key: str,
    number: int,
    own_weight: float,
    peers: Sequence[tuple[str, Path, float, bool]],
    evaluate: str,
    file: Path,
) -> MergeReport:
    """Merge an agent with its peers' snapshots and write the merged weights to `file`."""
    agent = _agents[key][0]
    report = agent.merge(number, own_weight, peers, evaluate)
    start = time.thread_time()
    agent.save(file)
    return replace(report, checkpoint_s=time.thread_time() - start)


def drop(key: str) -> None:
    """Forget an agent."""
    _agents.pop(key, None)


def _store(setup: Setup) -> CheckpointStore:
    assert setup.checkpoints is not None
    # what a simulated crash must survive is the end of an object in memory, not of this machine
    return CheckpointStore(setup.checkpoints, setup.config.simulate.checkpoints, durable=False)


def _first_round_key(setup: Setup) -> str:
    """Name everything that the outcome of the first round of training depends on, and nothing else."""
    config = setup.config
    parts = [
        config.task.model_dump_json(),
        config.train.model_dump_json(),
        str(config.schedule.rounds),  # the learning rate may fall over the whole run
        str(config.seed),
        setup.agent,
        blake3(setup.indices.numpy().tobytes()).hexdigest(),
        str(plan_merge(config.merge).accept),  # an agent's hold-out is not trained on
    ]
    return blake3("\x1f".join(parts).encode()).hexdigest()
