"""What simulated agents do on their own machines, done for real by the worker pool."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from dimat.agent.learner.learner import MergeReport, TrainedReport
from dimat.agent.lineage.lineage import append_record
from dimat.agent.protocol import messages as m
from dimat.agent.protocol.state import MachineState
from dimat.simulate.engines import worker
from dimat.simulate.engines.pool import WorkerPool, result_of
from dimat.simulate.folder import RunFolder
from dimat.simulate.world.compute_model import Compute
from dimat.simulate.world.scenario import Scenario
from dimat.train.trainer import round_steps
from dimat.weights.snapshot import SnapshotStore


class PoolWork:
    """The work of a scenario's agents. `store`: takes their snapshots in; `warm`: folder of first rounds shared by
    runs. `cpu_s`: seconds by activity."""

    def __init__(
        self,
        scenario: Scenario,
        folder: RunFolder,
        pool: WorkerPool,
        store: SnapshotStore,
        warm: Path | None = None,
    ) -> None:
        self.cpu_s: defaultdict[str, float] = defaultdict(float)
        self._scenario = scenario
        self._config = scenario.config
        self._folder = folder
        self._pool = pool
        self._store = store
        self._slots = {name: i for i, name in enumerate(scenario.agents, pool.take_slots(len(scenario.agents)))}
        self._batches: dict[str, int] = {}
        self._compute = Compute(
            self._config.simulate.compute, scenario.agents, self._config.seed, scenario.faults.timed
        )
        self._setups = {
            name: worker.Setup(
                self._key(name),
                name,
                self._config,
                part,
                folder.recorded(name),
                warm,
                folder.checkpoints / name if scenario.faults.crashes else None,
            )
            for name, part in zip(scenario.agents, scenario.parts, strict=True)
        }

    def create_all(self) -> list[str]:
        """Set all agents up; return warnings, each once."""
        jobs = {name: self._pool.submit(self._slots[name], worker.create, s) for name, s in self._setups.items()}
        messages: dict[str, None] = {}
        for name, job in jobs.items():
            made = result_of(job, f"the set-up of {name}")
            self._batches[name] = made.batches
            messages |= dict.fromkeys(made.warnings)
        return list(messages)

    def drop_all(self) -> None:
        """Let the workers forget all agents."""
        for name in self._setups:
            self.crash(name)

    def crash(self, agent: str) -> None:
        """Forget all of an agent that is not on disk."""
        self._pool.submit(self._slots[agent], worker.drop, self._key(agent))

    def restore(self, agent: str) -> Callable[[], tuple[MachineState, int] | None]:
        """Set an agent up from its newest checkpoint."""
        job = self._pool.submit(self._slots[agent], worker.restore, self._setups[agent])
        return self._outcome(agent, job, lambda found: found)

    def train_s(self, agent: str, action: m.Train, now: float) -> float:
        """Return how long training that begins now takes, in virtual seconds."""
        steps = round_steps(self._config.train, self._batches[agent], action.round)
        return self._compute.train_s(agent, steps, action.learn, now)

    def merge_s(self, agent: str, action: m.MergeAction) -> float:
        """Return how long a merge takes, in virtual seconds."""
        return self._config.simulate.compute.merge_s if action.parts else 0.0

    def train(self, agent: str, action: m.Train) -> Callable[[], TrainedReport]:
        """Train for a round and record the weights."""

        def outcome(report: TrainedReport) -> TrainedReport:
            self._store.take_in(report.payload, self._setups[agent].store)
            self.cpu_s["train"] += report.train_s
            self.cpu_s["publish"] += report.record_s
            if report.statistics_s:
                self.cpu_s["statistics"] += report.statistics_s
            return report

        return self._outcome(agent, self._submit(agent, worker.train, action.round, action.learn), outcome)

    def checkpoint(self, agent: str, action: m.CheckpointAction) -> Callable[[], object]:
        """Write the record of the merge, and the checkpoint where agents may crash."""
        if action.record is not None:
            append_record(self._folder.lineage, action.record, durable=False)
        if not self._scenario.faults.crashes:
            return lambda: None
        job = self._submit(agent, worker.checkpoint, action.state)

        def outcome(seconds: float) -> None:
            self.cpu_s["checkpoint"] += seconds

        return self._outcome(agent, job, outcome)

    def adopt_basis(self, agent: str, action: m.AdoptBasis, source: Path) -> Callable[[], m.Moves | None]:
        """Permute an agent into the basis of a snapshot."""
        return self._outcome(
            agent, self._submit(agent, worker.adopt, action.round, action.peer, source), lambda moves: moves
        )

    def adopt_weights(self, agent: str, action: m.AdoptWeights, source: Path) -> Callable[[], str]:
        """Take over the weights of a snapshot."""
        return self._outcome(agent, self._submit(agent, worker.take_over, action.peer, source), lambda fault: fault)

    def merge(self, agent: str, action: m.MergeAction, sources: Mapping[str, Path]) -> Callable[[], m.MergeDone]:
        """Merge snapshots into own weights."""

        def outcome(report: MergeReport) -> m.MergeDone:
            self.cpu_s["merge"] += report.merge_s
            self.cpu_s["evaluate"] += report.evaluate_s
            self.cpu_s["checkpoint"] += report.checkpoint_s
            return report.done(action.round)

        parts = [(part.peer, sources[part.peer], part.weight, part.same_basis) for part in action.parts]
        file = self._folder.state_file(agent, action.round)
        evaluate = self._config.simulate.evaluate
        job = self._submit(agent, worker.merge, action.round, action.own_weight, parts, evaluate, file)
        return self._outcome(agent, job, outcome)

    def _key(self, agent: str) -> str:
        return f"{self._folder.path}:{agent}"

    def _submit(self, agent: str, job: Callable[..., Any], *args: Any) -> Future[Any]:
        return self._pool.submit(self._slots[agent], job, self._key(agent), *args)

    def _outcome(self, agent: str, job: Future[Any], outcome: Callable[[Any], Any]) -> Callable[[], Any]:
        return lambda: outcome(result_of(job, f"the work of {agent}"))
