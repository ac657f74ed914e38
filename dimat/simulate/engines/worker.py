"""A worker process of the simulator: its agents by key, and the work they are asked for.

Imported by the clean server process from which workers are forked, so that torch is loaded once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from blake3 import blake3

from dimat.agent.learner.checkpoint import Stored, read_state, write_state
from dimat.agent.learner.checkpoint_store import CheckpointStore
from dimat.agent.learner.learner import Learner
from dimat.agent.protocol.messages import AdoptBasis, AdoptWeights, MergeAction, Moves, Train
from dimat.agent.protocol.state import MachineState, Restored
from dimat.agent.setup.loaded_task import load_for
from dimat.config import ExperimentConfig
from dimat.events import MergeResult, TrainResult
from dimat.merge import plan_merge
from dimat.merge.weight_views import content_hash
from dimat.train.base import ModelTrainer, TrainerState, TrainReport
from dimat.weights.snapshot import RecordedSnapshot, make_folder


@dataclass(frozen=True, slots=True)
class LearnerSetup:
    """The settings from which a worker makes an agent.

    `store`: folder in which it alone records its snapshots; `warm`: folder in which first rounds of training are kept
    and found; `checkpoints`: folder of the agent's checkpoints, None where it needs none.
    """

    key: str
    agent: str
    config: ExperimentConfig
    indices: torch.Tensor
    store: Path
    warm: Path | None
    checkpoints: Path | None = None


@dataclass(frozen=True, slots=True)
class CreatedLearner:
    """An agent that was set up.

    `batches`: in an epoch of its data; `warnings` of its symmetry derivation; `start`: hash of the weights that it
    begins with, where all are to begin with the same ones.
    """

    batches: int
    warnings: tuple[str, ...]
    start: str


_agents: dict[str, tuple[Learner, LearnerSetup]] = {}


def create(setup: LearnerSetup) -> CreatedLearner:
    """Make an agent in this process."""
    make_folder(setup.store)
    loaded = load_for(setup.config)
    agent = loaded.learner(setup.agent, setup.config, setup.indices, setup.store, durable=False)
    _agents[setup.key] = (agent, setup)
    warnings = loaded.spec.warnings if loaded.spec is not None else ()
    shared = setup.config.train.initialisation == "shared"
    start = content_hash(agent.trainer.weights(copy=False)) if shared else ""
    return CreatedLearner(agent.trainer.batches, warnings, start)


def restore(setup: LearnerSetup) -> Restored | None:
    """Make an agent anew from its newest checkpoint; return the round machine's part of it."""
    create(setup)
    learner = _agents[setup.key][0]
    found = _store(setup).newest(setup.config.run, setup.agent, learner.schema()) if setup.checkpoints else None
    if found is None:
        return None
    note = learner.restore(found.checkpoint)
    return Restored(found.checkpoint.machine, found.published, found.passed_over, note)


def checkpoint(key: str, machine: MachineState) -> float:
    """Write an agent's checkpoint; return the CPU-seconds that it took."""
    start = time.thread_time()
    learner, setup = _agents[key]
    if setup.checkpoints is not None:
        _store(setup).save(learner.checkpoint(machine))
    return time.thread_time() - start


def train(key: str, action: Train) -> TrainResult:
    """Train an agent.

    The first round is taken from the warm folder if an equal one was trained before.
    """
    learner, setup = _agents[key]
    if action.round != 1 or not action.learn or setup.warm is None:
        return learner.train(action.round, action.learn)
    file = setup.warm / f"{_first_round_key(setup)}.safetensors"
    if file.exists():
        result = learner.train(action.round, kept=lambda trainer: _trained_before(trainer, file))
        return replace(result, cpu_s={**result.cpu_s, "train": 0.0})
    result = learner.train(action.round, action.learn)
    state = learner.trainer.state()
    values = {**state.values, "report/loss": result.loss, "report/samples": result.samples}
    write_state(file, Stored(state.tensors, values), durable=False)
    return result


def _trained_before(trainer: ModelTrainer, file: Path) -> TrainReport:
    """Bring a trainer to the end of a first round that is kept in a file; return the report of that training."""
    kept = read_state(file)
    values = dict(kept.values)
    loss, samples = float(values.pop("report/loss")), int(values.pop("report/samples"))
    trainer.load_state(TrainerState(dict(kept.tensors), values))
    return TrainReport(loss, samples, steps=0, cpu_s=0.0, wall_s=0.0)


def record(key: str) -> tuple[RecordedSnapshot, float]:
    """Record an agent's weights as a snapshot; return it, and the CPU-seconds that it took."""
    start = time.thread_time()
    learner = _agents[key][0]
    snapshot = learner.record()
    for form in snapshot.forms:  # of which the simulated network only counts the bytes
        (learner.store / f"{form.payload.root}.safetensors").unlink(missing_ok=True)
    return snapshot, time.thread_time() - start


def adopt_basis(key: str, action: AdoptBasis, source: Path) -> Moves | None:
    """Bring an agent into the basis of a peer's snapshot.

    Return which units moved, None if it cannot.
    """
    return _agents[key][0].adopt_basis(action.round, action.peer, source)


def adopt_weights(key: str, action: AdoptWeights, source: Path) -> str:
    """Let an agent take over a peer's weights; return why it could not, or an empty string."""
    return _agents[key][0].adopt_weights(action.peer, source)


def merge(key: str, action: MergeAction, sources: Mapping[str, Path], evaluate: str, file: Path) -> MergeResult:
    """Merge an agent with its peers' snapshots and write the merged weights to `file`."""
    learner = _agents[key][0]
    result = learner.merge(action, sources, evaluate)
    start = time.thread_time()
    learner.save(file)
    return replace(result, cpu_s={**result.cpu_s, "checkpoint": time.thread_time() - start})


def drop(key: str) -> None:
    """Forget an agent."""
    _agents.pop(key, None)


def _store(setup: LearnerSetup) -> CheckpointStore:
    assert setup.checkpoints is not None
    # what a simulated crash must survive is the end of an object in memory, not of this machine
    return CheckpointStore(setup.checkpoints, setup.config.simulate.checkpoints, durable=False)


def _first_round_key(setup: LearnerSetup) -> str:
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
