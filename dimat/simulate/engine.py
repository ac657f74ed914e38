"""The simulator: drives the round machine of every agent in one process, on a virtual clock.

Events wait in a queue ordered by virtual time, then by when they were put there. Work (training, merging) is
handed to the worker pool at once and its outcome is queued for the virtual time at which it ends; the loop
waits for it only when its turn comes. So workers run ahead in parallel, while the order in which machines see
events, and with it every result, depends on the experiment alone.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from dimat import __version__
from dimat import events as facts
from dimat.agent import messages
from dimat.agent.basis import BasisId
from dimat.agent.local import MergeReport, TrainedReport
from dimat.agent.round import RoundMachine
from dimat.errors import DataError, DimatError, NetworkError
from dimat.net.memory import MemoryNetwork
from dimat.results import AgentRound, Results, round_summary
from dimat.seeds import derive_seed
from dimat.simulate import worker
from dimat.simulate.consensus import consensus_distances
from dimat.simulate.folder import RunFolder, describe
from dimat.simulate.pool import WorkerPool, result_of
from dimat.simulate.scenario import TRAIN_S, Scenario
from dimat.snapshot import Manifest, SnapshotStore


@dataclass(slots=True)
class AgentState:
    """What the simulator keeps of one agent beside its machine."""

    index: int
    machine: RoundMachine
    manifest: Manifest | None = None
    report: TrainedReport | None = None
    held: list[str] = field(default_factory=list[str])
    fetched: dict[str, Any] = field(default_factory=dict[str, Any])
    done: bool = False


@dataclass(order=True, slots=True)
class Queued:
    """An event (or the future of one) for an agent at a virtual time."""

    time_s: float
    sequence: int
    agent: str = field(compare=False)
    event: Callable[[], messages.Event] = field(compare=False)


class Simulation:
    """One run of a scenario. `listeners` are told every event; `warm`: folder of first rounds shared by runs."""

    def __init__(
        self,
        scenario: Scenario,
        folder: RunFolder,
        pool: WorkerPool,
        listeners: Sequence[facts.Listener] = (),
        warm: Any = None,
    ) -> None:
        self._scenario = scenario
        self._config = scenario.config
        self._folder = folder
        self._pool = pool
        self._first_slot = pool.take_slots(len(scenario.agents))
        self.listeners = list(listeners)
        self._warm = warm
        self._store = SnapshotStore(folder.snapshots, keep=self._config.simulate.keep_snapshots)
        self._network = MemoryNetwork(self._store)
        self._queue: list[Queued] = []
        self._sequence = 0
        self._now = 0.0
        self._agents: dict[str, AgentState] = {}
        self._merged: dict[int, dict[str, AgentRound]] = {}
        self._rows: list[AgentRound] = []
        self._warnings: list[str] = []
        self._refused: set[tuple[str, str]] = set()
        self._written = 0.0
        self._cpu_s: defaultdict[str, float] = defaultdict(float)
        self._mb_sent = 0.0
        self._stopping = threading.Event()

    def stop(self) -> None:
        """End the run as Ctrl-C does, from another thread. Whoever calls it ends the pool's workers too."""
        self._stopping.set()

    # ── the run ──────────────────────────────────────────────────────────────────────────────────────────────
    def run(self) -> Results:
        """Run to the end, or to Ctrl-C, after which the complete rounds are kept."""
        started = time.perf_counter()
        status = "done"
        try:
            self._begin()
            self._loop()
        except KeyboardInterrupt:
            status = "stopped"
            self._pool.terminate()
        except (DimatError, CancelledError):
            if not self._stopping.is_set():
                self._close("failed", time.perf_counter() - started)
                raise
            status = "stopped"
        return self._close(status, time.perf_counter() - started)

    def _close(self, status: str, wall: float) -> Results:
        """Keep the complete rounds, whatever ended the run, and let the workers forget its agents."""
        complete = max((row.round for row in self._rows), default=0)
        self._folder.finish(list(self._agents), complete)
        results = self._results(status, wall)
        self._folder.write_results(results)
        self._emit(facts.RunFinished(reason=status, rounds_done=complete, wall_s=wall))
        for name in self._agents:
            with suppress(DimatError):  # a worker that has ended remembers nothing
                self._pool.submit(self._slot(name), worker.drop, self._key(name))
        return results

    def _begin(self) -> None:
        scenario = self._scenario
        memory, disk, sent = scenario.estimate(self._pool.size)
        self._emit(
            facts.RunStarted(
                method=self._config.merge.method,
                seed=self._config.seed,
                agents=scenario.agents,
                edges=scenario.edges(),
                rounds=scenario.rounds,
                parameters=scenario.parameters,
                snapshot_bytes=scenario.snapshot_bytes,
                histogram=scenario.histogram,
                metric=scenario.task.metric,
                estimated_memory_mb=memory,
                estimated_disk_mb=disk,
                estimated_mb_sent=sent,
                workers=self._pool.size,
            )
        )
        for index, name in enumerate(scenario.agents):
            nonce = f"{derive_seed(self._config.seed, 'basis', name):016x}"
            machine = RoundMachine(
                name,
                lambda number, agent=name: scenario.round_plan(agent, number),
                rounds=scenario.rounds,
                basis=BasisId(0, name, nonce),
                basis_gossip=scenario.plan.align.name != "none" and scenario.plan.align_to == "shared",
                deadline_s=self._config.schedule.round_deadline_s,
            )
            self._agents[name] = AgentState(index, machine)
        setups = [
            self._pool.submit(
                self._slot(name),
                worker.create,
                worker.Setup(
                    self._key(name),
                    name,
                    self._config,
                    scenario.parts[state.index],
                    self._folder.snapshots,
                    self._warm,
                ),
            )
            for name, state in self._agents.items()
        ]
        for name, setup in zip(self._agents, setups, strict=True):
            for message in result_of(setup, f"the set-up of {name}"):
                self._warn(message)
            self._put(0.0, name, messages.Started())

    def _loop(self) -> None:
        while self._queue:
            if self._stopping.is_set():
                raise KeyboardInterrupt
            item = heapq.heappop(self._queue)
            self._now = item.time_s
            state = self._agents[item.agent]
            if state.done:
                continue
            for action in state.machine.handle(item.event()):
                self._perform(item.agent, state, action)
            if all(s.done for s in self._agents.values()):
                return
        stuck = [f"{name} ({s.machine.phase.value})" for name, s in self._agents.items() if not s.done]
        raise DimatError(f"the simulation has nothing left to do, yet agents wait: {', '.join(stuck)}")

    # ── carrying actions out ─────────────────────────────────────────────────────────────────────────────────
    def _perform(self, name: str, state: AgentState, action: messages.Action) -> None:
        match action:
            case messages.Train():
                self._train(name, state, action)
            case messages.Checkpoint(round=number, stage=stage):
                # written by the job before it: the training job records weights, the merging job saves them
                self._emit(facts.Checkpointed(agent=name, round=number, stage=stage))
                if stage == "merged":
                    self._finish_round(name, number)
            case messages.Publish():
                self._publish(name, state, action)
            case messages.Fetch():
                self._fetch(name, state, action)
            case messages.AdoptBasis():
                path = state.fetched[action.peer]
                job = self._submit(name, worker.adopt, action.round, action.peer, path)
                own = state.machine.basis
                self._put_job(
                    name,
                    job,
                    lambda moved: messages.BasisChanged(
                        action.round, own if moved is None else action.basis, moved or 0.0
                    ),
                )
            case messages.Merge():
                self._merge(name, state, action)
            case messages.SetTimer(round=number, seconds=seconds):
                self._put(seconds, name, messages.Deadline(number))
            case messages.Report(fact=fact):
                self._report(name, state, fact)
            case messages.Exit():
                state.done = True

    def _train(self, name: str, state: AgentState, action: messages.Train) -> None:
        def outcome(report: TrainedReport) -> messages.Event:
            state.report = report
            self._cpu_s["train"] += report.train_s
            self._cpu_s["publish"] += report.record_s
            if action.learn:
                self._emit(
                    facts.Trained(
                        agent=name,
                        round=action.round,
                        loss=report.loss,
                        samples=report.samples,
                        train_s=report.train_s,
                    )
                )
            return messages.TrainingDone(action.round, report.payload.root)

        job = self._submit(name, worker.train, action.round, action.learn)
        self._put_job(name, job, outcome, TRAIN_S if action.learn else 0.0)

    def _publish(self, name: str, state: AgentState, action: messages.Publish) -> None:
        report = state.report
        if report is None or report.payload.root != action.root:
            raise DimatError(f"{name} was asked to publish a snapshot that it has not recorded")
        manifest = Manifest(
            run=self._config.run,
            agent=name,
            round=action.round,
            basis=str(action.basis),
            schema=report.schema,
            payload=report.payload,
            samples=len(self._scenario.parts[state.index]),
            parents=tuple((p.agent, p.snapshot, p.round, p.weight) for p in action.parents),
        )
        self._network.publish(manifest)
        published = facts.Published(
            agent=name, round=action.round, snapshot=action.root, bytes=report.payload.bytes, basis=str(action.basis)
        )
        self._emit(published)
        for reader in self._scenario.readers(name, action.round):
            self._put(0.0, reader, messages.PeerPublished(name, action.round, action.root, action.basis))

    def _fetch(self, name: str, state: AgentState, action: messages.Fetch) -> None:
        try:
            manifest, path, moved = self._network.fetch(name, action.peer, action.round)
        except (NetworkError, DataError) as error:
            self._put(0.0, name, messages.FetchFailed(action.peer, action.round, action.root, str(error)))
            return
        self._store.hold(manifest.payload.root)
        state.held.append(manifest.payload.root)
        state.fetched[action.peer] = path
        fetched = facts.SnapshotFetched(
            agent=name, round=action.round, peer=action.peer, snapshot=action.root, bytes=moved
        )
        self._emit(fetched)
        self._put(0.0, name, messages.SnapshotReady(action.peer, action.round, action.root))

    def _merge(self, name: str, state: AgentState, action: messages.Merge) -> None:
        def outcome(report: MergeReport) -> messages.Event:
            self._cpu_s["merge"] += report.merge_s
            self._cpu_s["evaluate"] += report.evaluate_s
            self._cpu_s["checkpoint"] += report.checkpoint_s
            for root in state.held:
                self._store.release(root)
            state.held.clear()
            state.fetched.clear()
            return messages.MergeDone(
                action.round,
                report.refused,
                accepted=report.accepted,
                before=report.before,
                after=report.after,
                merge_s=report.merge_s,
                notes=report.notes,
            )

        parts = [(p.peer, state.fetched[p.peer], p.weight, p.same_basis) for p in action.parts]
        evaluate = self._config.simulate.evaluate
        file = self._folder.state_file(name, action.round)
        job = self._submit(name, worker.merge, action.round, action.own_weight, parts, evaluate, file)
        self._put_job(name, job, outcome)

    def _report(self, name: str, state: AgentState, fact: facts.Event) -> None:
        self._emit(fact)
        if isinstance(fact, facts.Warned):
            self._warnings.append(f"{name}: {fact.message}")
        if isinstance(fact, facts.PeerRefused) and (name, fact.peer) not in self._refused:
            self._refused.add((name, fact.peer))
            self._warn(f"{name} refused {fact.peer} in round {fact.round}: {fact.reason}")
        if not isinstance(fact, facts.Merged):
            return
        for note in fact.notes:
            self._warn(note)
        metric = self._scenario.task.metric
        row = AgentRound(
            round=fact.round,
            agent=name,
            loss=state.report.loss if state.report and fact.round <= self._config.schedule.rounds else None,
            before=fact.before.get(metric),
            after=fact.after.get(metric),
            heard=fact.heard,
            expected=fact.expected,
            bytes_sent=0,
            bytes_received=0,
            basis=str(state.machine.basis),
            accepted=fact.accepted,
            consensus_distance=0.0,
            samples=state.report.samples if state.report else 0,
            time_s=self._now,
        )
        self._merged.setdefault(fact.round, {})[name] = row

    # ── rounds and results ───────────────────────────────────────────────────────────────────────────────────
    def _finish_round(self, name: str, number: int) -> None:
        """Close an agent's round; when it was the last agent's, write the round's rows and tell its summary."""
        rows = self._merged[number]
        sent, received = self._network.sent[name, number], self._network.received[name, number]
        self._emit(
            facts.RoundFinished(
                agent=name,
                round=number,
                heard=rows[name].heard,
                expected=rows[name].expected,
                bytes_sent=sent,
                bytes_received=received,
            )
        )
        if len(rows) < len(self._agents):
            return
        files = {agent: self._folder.state_file(agent, number) for agent in self._agents}
        distances = consensus_distances(files)
        finished = [
            rows[agent].model_copy(
                update={
                    "consensus_distance": distances[agent],
                    "bytes_sent": self._network.sent[agent, number],
                    "bytes_received": self._network.received[agent, number],
                }
            )
            for agent in self._agents
        ]
        del self._merged[number]
        self._rows += finished
        for agent in self._agents:
            self._folder.state_file(agent, number - 1).unlink(missing_ok=True)
        self._mb_sent += sum(row.bytes_sent for row in finished) / 1e6
        self._emit(round_summary(self._config.run, finished, self._scenario.rounds, self._mb_sent))
        if time.perf_counter() - self._written > 1:  # what kill -9 leaves; not once a round where rounds are short
            self._folder.write_results(self._results("stopped", 0.0))
            self._written = time.perf_counter()

    def _results(self, status: str, wall_s: float) -> Results:
        scenario = self._scenario
        return Results(
            version=__version__,
            run=self._config.run,
            method=self._config.merge.method,
            seed=self._config.seed,
            status=status,
            config=describe(self._config),
            agents=list(scenario.agents),
            edges=list(scenario.edges()),
            metric=scenario.task.metric,
            classes=list(scenario.task.classes),
            histogram={agent: list(row) for agent, row in scenario.histogram.items()},
            parameters=scenario.parameters,
            snapshot_bytes=scenario.snapshot_bytes,
            rows=self._rows,
            warnings=self._warnings,
            wall_s=wall_s,
            cpu_s=dict(self._cpu_s),
        )

    # ── queue and events ─────────────────────────────────────────────────────────────────────────────────────
    def _key(self, name: str) -> str:
        return f"{self._folder.path}:{name}"

    def _slot(self, name: str) -> int:
        return self._first_slot + self._agents[name].index

    def _submit(self, name: str, job: Callable[..., Any], *args: Any) -> Future[Any]:
        return self._pool.submit(self._slot(name), job, self._key(name), *args)

    def _put(self, delay_s: float, name: str, event: messages.Event) -> None:
        self._push(delay_s, name, lambda: event)

    def _put_job(
        self, name: str, job: Future[Any], outcome: Callable[[Any], messages.Event], delay_s: float = 0.0
    ) -> None:
        self._push(delay_s, name, lambda: outcome(result_of(job, f"the work of {name}")))

    def _push(self, delay_s: float, name: str, event: Callable[[], messages.Event]) -> None:
        self._sequence += 1
        heapq.heappush(self._queue, Queued(self._now + delay_s, self._sequence, name, event))

    def _warn(self, message: str) -> None:
        if message not in self._warnings:
            self._warnings.append(message)
            self._emit(facts.Warned(message=message))

    def _emit(self, fact: facts.Event) -> None:
        stamped = replace(fact, run=self._config.run, time_s=self._now)
        for listener in self.listeners:
            listener(stamped)
