"""The work of simulated agents, done for real by the learners that live in the worker pool."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from dimat.agent.lineage.lineage import append_record
from dimat.agent.protocol import messages as m
from dimat.agent.protocol.state import Restored
from dimat.agent.protocol.work import Outcome
from dimat.errors import ConfigError
from dimat.events import MergeResult, TrainResult
from dimat.merge import plan_merge
from dimat.simulate.engines import worker
from dimat.simulate.engines.pool import WorkerPool, result_of
from dimat.simulate.folder import RunFolder
from dimat.simulate.node import SimulatedWork
from dimat.simulate.world.compute_model import Compute
from dimat.simulate.world.scenario import Scenario
from dimat.train.progress import round_steps
from dimat.weights.snapshot import RecordedSnapshot, SnapshotStore


class PooledLearners:
    """The learners of a scenario's agents, each in a worker of the pool.

    `of`: by agent, its work.

    `store`: takes their snapshots in; `warm`: folder of first rounds shared by runs; `cpu_s`: CPU-seconds by activity.
    """

    def __init__(
        self,
        scenario: Scenario,
        folder: RunFolder,
        pool: WorkerPool,
        store: SnapshotStore,
        warm: Path | None = None,
    ) -> None:
        self.cpu_s: defaultdict[str, float] = defaultdict(float)
        self.scenario = scenario
        self.folder = folder
        self.pool = pool
        self.store = store
        config = scenario.config
        self.compute = Compute(config.simulate.compute, scenario.agents, config.seed, scenario.faults.timed)
        first = pool.take_slots(len(scenario.agents))
        self.of: dict[str, PooledLearner] = {}
        for slot, (name, part) in enumerate(zip(scenario.agents, scenario.parts, strict=True), first):
            setup = worker.LearnerSetup(
                f"{folder.path}:{name}",
                name,
                config.of_agent(name),
                part,
                folder.recorded(name),
                warm,
                folder.checkpoints / name if scenario.faults.crashes else None,
            )
            self.of[name] = PooledLearner(self, setup, slot)

    def create_all(self) -> list[str]:
        """Set all agents up; return warnings, each once. ConfigError where agents that are to begin with the same
        weights, since their models are the same, do not."""
        created = [wait() for wait in [learner.create() for learner in self.of.values()]]
        starts: dict[str, set[str]] = {}
        for learner, made in zip(self.of.values(), created, strict=True):
            starts.setdefault(learner.model, set()).add(made.start)
        if any(len(found) > 1 for found in starts.values()):
            raise ConfigError(
                f'train.initialisation = "shared", but build_model() of task {self.scenario.task.name} makes other '
                "weights at each call: draw them from the generator that it is given (dimat.tasks.seeded does), or set "
                '"own"'
            )
        return list(dict.fromkeys(warning for made in created for warning in made.warnings))

    def drop_all(self) -> None:
        """Let the workers forget all agents."""
        for learner in self.of.values():
            learner.crash()


class PooledLearner(SimulatedWork):
    """The work of one agent: it begins with the call, in the agent's worker process."""

    def __init__(self, learners: PooledLearners, setup: worker.LearnerSetup, slot: int) -> None:
        self._learners = learners
        self._setup = setup
        self._slot = slot
        self._batches = 0
        self._rebased = 0  # the last round in which a basis was taken over

    @property
    def model(self) -> str:
        """What tells its model from those of agents with others."""
        return str(self._setup.config.task.options)

    def create(self) -> Outcome[worker.CreatedLearner]:
        """Set the agent up."""
        name = f"the set-up of {self._setup.agent}"
        job = self._learners.pool.submit(self._slot, worker.create, self._setup)

        def created() -> worker.CreatedLearner:
            made: worker.CreatedLearner = result_of(job, name)
            self._batches = made.batches
            return made

        return created

    def crash(self) -> None:
        """Forget everything of the agent that is not on disk."""
        self._submit(worker.drop)

    def restore(self) -> Outcome[Restored | None]:
        """Set the agent up from its newest checkpoint."""
        return self._outcome(self._learners.pool.submit(self._slot, worker.restore, self._setup))

    def train_s(self, action: m.Train, now: float) -> float:
        """Return how long training that begins now takes, in virtual seconds."""
        config = self._setup.config
        steps = round_steps(config.train, self._batches, config.schedule.round_of(action.round))
        return self._learners.compute.train_s(self._setup.agent, steps, action.learn, now)

    def merge_s(self, action: m.MergeAction, now: float) -> float:
        """Return how long a merge that begins now takes, in virtual seconds."""
        config = self._setup.config
        if not action.parts:
            return 0.0
        steps = round_steps(config.train, self._batches, config.schedule.round_of(action.round))
        round_s = self._learners.compute.train_s(self._setup.agent, steps, True, now)
        return config.simulate.compute.merge_s + round_s * self._taught_steps(action) / steps

    def _taught_steps(self, action: m.MergeAction) -> int:
        """Return the optimizer steps that are part of a merge."""
        config, schedule = self._setup.config, self._setup.config.schedule
        if config.merge.preset.shares == "logits":
            return plan_merge(config.merge).combine.settings["steps"]
        first = self._rebased == action.round or not all(part.same_basis for part in action.parts)
        distils = schedule.first_merge == "adopt-distil" and first and action.round <= schedule.adopt_rounds
        return schedule.distil.steps if distils else 0

    def train(self, action: m.Train) -> Outcome[TrainResult]:
        """Train for a round."""
        return self._counted(self._submit(worker.train, action))

    def record(self, action: m.Train) -> Outcome[RecordedSnapshot]:
        """Record the weights: once the outcome is here their snapshot is in the network's store."""
        wait = self._outcome(self._submit(worker.record))

        def recorded() -> RecordedSnapshot:
            snapshot, seconds = wait()
            self._learners.store.take_in(snapshot.payload, self._setup.store)
            self._learners.cpu_s["publish"] += seconds
            return snapshot

        return recorded

    def checkpoint(self, action: m.CheckpointAction) -> Outcome[None]:
        """Write the record of the merge, and the checkpoint where agents may crash."""
        if action.record is not None:
            append_record(self._learners.folder.lineage, action.record, durable=False)
        if self._setup.checkpoints is None:
            return lambda: None
        wait = self._outcome(self._submit(worker.checkpoint, action.state))

        def written() -> None:
            self._learners.cpu_s["checkpoint"] += wait()

        return written

    def adopt_basis(self, action: m.AdoptBasis, source: Path) -> Outcome[m.Moves | None]:
        """Bring the agent into the basis of a snapshot."""
        self._rebased = action.round
        return self._outcome(self._submit(worker.adopt_basis, action, source))

    def adopt_weights(self, action: m.AdoptWeights, source: Path) -> Outcome[str]:
        """Take over the weights of a snapshot."""
        return self._outcome(self._submit(worker.adopt_weights, action, source))

    def merge(self, action: m.MergeAction, sources: Mapping[str, Path]) -> Outcome[MergeResult]:
        """Merge snapshots into the agent's own weights."""
        file = self._learners.folder.state_file(self._setup.agent, action.round)
        config = self._setup.config
        due = config.schedule.round_of(action.round) % config.simulate.evaluate_every == 0
        evaluate = config.simulate.evaluate if due else "none"
        return self._counted(self._submit(worker.merge, action, sources, evaluate, file))

    def _submit(self, job: Callable[..., Any], *args: Any) -> Future[Any]:
        return self._learners.pool.submit(self._slot, job, self._setup.key, *args)

    def _outcome(self, job: Future[Any]) -> Outcome[Any]:
        return lambda: result_of(job, f"the work of {self._setup.agent}")

    def _counted(self, job: Future[Any]) -> Outcome[Any]:
        """Return the outcome of a job, whose CPU-seconds are added up."""
        wait = self._outcome(job)

        def counted() -> Any:
            result: TrainResult | MergeResult = wait()
            for activity, seconds in result.cpu_s.items():
                self._learners.cpu_s[activity] += seconds
            return result

        return counted
