"""One simulated run: sets agents up, drives them, and turns their events into results."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from dimat import events
from dimat.agent.setup.machine import machine_for
from dimat.agent.setup.schedule import RunSchedule
from dimat.errors import DimatError
from dimat.events.view import AgentView
from dimat.results import AgentRound, Results, round_summary
from dimat.simulate.driver import Driver, Node
from dimat.simulate.engines.pool import WorkerPool
from dimat.simulate.engines.pooled_learners import PooledLearners
from dimat.simulate.folder import RunFolder, describe
from dimat.simulate.in_process_network import MemoryNetwork
from dimat.simulate.trace import TraceWriter
from dimat.simulate.world.link_model import Links
from dimat.simulate.world.scenario import Scenario
from dimat.version import __version__
from dimat.weights.header import LONGEST_HEADER
from dimat.weights.snapshot import SnapshotStore
from dimat.weights.tensors import open_tensors

E = TypeVar("E", bound=events.Event)


class Simulation:
    """One run of a scenario.

    `listeners` are told every event; `warm`: folder of first rounds shared by runs.
    """

    def __init__(
        self,
        scenario: Scenario,
        folder: RunFolder,
        pool: WorkerPool,
        listeners: Sequence[events.Listener] = (),
        warm: Path | None = None,
    ) -> None:
        self._scenario = scenario
        self._config = scenario.config
        self._folder = folder
        self._pool = pool
        self.listeners = list(listeners)
        schedule = scenario.schedule
        store = SnapshotStore(folder.snapshots, keep=schedule.snapshots_kept(self._config.simulate.keep_snapshots))
        self._learners = PooledLearners(scenario, folder, pool, store, warm)
        self._network = MemoryNetwork(store)
        self._driver = Driver(
            self._config.run,
            {
                name: Node(schedule.plan(name), partial(machine_for, schedule, name), work)
                for name, work in self._learners.of.items()
            },
            self._network,
            Links(self._config.simulate.network, scenario.agents, self._config.seed),
            scenario.faults,
            self._on_event,
            _readers(schedule),
            max_time_s=self._config.schedule.max_time_s,
        )
        self._views = {agent: AgentView(agent) for agent in scenario.agents}
        self._open: dict[int, dict[str, AgentRound]] = {}
        self._rows: list[AgentRound] = []
        self._progress = dict.fromkeys((a for a in scenario.agents if a not in scenario.faults.late), 0)
        self._at = Counter(self._progress.values())
        self._kept: dict[str, int] = {}  # the last round of each agent that was closed: its weights are kept
        self._warnings: list[str] = []
        self._refused: set[tuple[str, str]] = set()
        self._written = 0.0

    def stop(self) -> None:
        """End the run as Ctrl-C does, from another thread.

        The caller ends the pool's workers too.
        """
        self._driver.stop()

    # ── the run ──────────────────────────────────────────────────────────────────────────────────────────────
    def run(self) -> Results:
        """Run to the end, or to Ctrl-C, after which the complete rounds are kept."""
        started = time.perf_counter()
        status = "done"
        try:
            self._begin()
            with ExitStack() as stack:
                if self._config.simulate.trace:
                    self._driver.trace = stack.enter_context(TraceWriter(self._folder.trace))
                self._driver.run()
            self._finish_rounds(everything=True)
            self._look_back()
        except KeyboardInterrupt:
            status = "stopped"
            self._pool.terminate()
        except (DimatError, CancelledError):
            if not self._driver.stopping:
                self._close("failed", time.perf_counter() - started)
                raise
            status = "stopped"
        return self._close(status, time.perf_counter() - started)

    def _close(self, status: str, wall: float) -> Results:
        """Keep the complete rounds, whatever ended the run, and let the workers forget its agents."""
        complete = max((row.round for row in self._rows), default=0)
        self._folder.finish(self._kept)
        results = self._results(status, wall)
        self._folder.write_results(results)
        self._emit(events.RunFinished(reason=status, rounds_done=complete, wall_s=wall))
        with suppress(DimatError):  # a worker that has ended remembers nothing
            self._learners.drop_all()
        return results

    def _begin(self) -> None:
        scenario = self._scenario
        memory, disk, sent = scenario.estimate(self._pool.size)
        self._emit(
            events.RunStarted(
                method=self._config.merge.method,
                seed=self._config.seed,
                agents=scenario.agents,
                edges=scenario.schedule.edges(),
                rounds=scenario.schedule.rounds,
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
        for message in (*scenario.warnings, *self._learners.create_all()):
            self._warn(message)

    # ── events in ─────────────────────────────────────────────────────────────────────────────────────────────
    def _on_event(self, event: events.Event) -> None:
        """Take an event from the driver, pass it on, and keep what the results need."""
        self._emit(event)
        match event:
            case events.Merged():  # at once, not when the round is over: the log has them beside their merge
                for note in event.result.notes:
                    self._warn(note)
            case events.Checkpointed(stage="merged"):
                self._passed(event.agent, event.round)
            case events.Joined():
                self._come(event.agent, event.round - 1)
            case events.AgentLeft() | events.AgentCrashed(back_s=None):
                self._gone(event.agent)
            case events.Resumed():
                self._come(event.agent, event.round - (event.stage == "trained"))
            case events.PeerRefused() if (event.agent, event.peer) not in self._refused:
                self._refused.add((event.agent, event.peer))
                self._warn(f"{event.agent} refused {event.peer} in round {event.round}: {event.reason}")
            case events.Warned():
                self._warnings.append(f"{event.agent}: {event.message}")
            case _:
                pass

    # ── rounds and results ───────────────────────────────────────────────────────────────────────────────────
    def _come(self, agent: str, number: int) -> None:
        """Count an agent that is there, or back, with its rounds up to `number` behind it."""
        if agent in self._progress:
            self._at[self._progress[agent]] -= 1
        self._progress[agent] = number
        self._at[number] += 1

    def _gone(self, agent: str) -> None:
        """Wait for an agent's rounds no more."""
        number = self._progress.pop(agent, None)
        if number is not None:
            self._at[number] -= 1
            self._at += Counter()  # drops what has fallen to 0
            self._finish_rounds()

    def _passed(self, agent: str, number: int) -> None:
        sent, received = self._network.sent[agent, number], self._network.received[agent, number]
        finished = self._emit(self._views[agent].round_finished(number, sent, received))
        # a row counts once the merge is durable: after a crash before that it is made anew
        self._open.setdefault(number, {})[agent] = AgentRound.of(finished, self._scenario.task.metric)
        if agent in self._progress:
            self._at[self._progress[agent]] -= 1
            self._at[number] += 1
            self._progress[agent] = number
        self._finish_rounds()

    def _finish_rounds(self, *, everything: bool = False) -> None:
        """Close the rounds that everybody who is there has passed: their rows, and the line that sums them up."""
        behind = min((number for number, count in self._at.items() if count), default=None)
        for number in sorted(self._open):
            if everything or behind is None or number <= behind:
                self._finish_round(number)

    def _finish_round(self, number: int) -> None:
        rows = self._open.pop(number)
        order = [agent for agent in self._scenario.agents if agent in rows]
        files = {agent: self._folder.state_file(agent, number) for agent in order}
        distances = consensus_distances(files)
        finished = [
            rows[agent].model_copy(
                update={
                    "consensus_distance": distances[agent],
                    "bytes_sent": self._network.sent[agent, number],
                    "bytes_received": self._network.received[agent, number],
                }
            )
            for agent in order
        ]
        self._rows += finished
        for agent in order:
            if agent in self._kept:
                self._folder.state_file(agent, self._kept[agent]).unlink(missing_ok=True)
            self._kept[agent] = number
        sent = sum(self._network.sent.values()) / 1e6
        self._emit(round_summary(self._config.run, finished, self._scenario.schedule.rounds, sent))
        if time.perf_counter() - self._written > 1:  # what kill -9 leaves; not once a round where rounds are short
            self._folder.write_results(self._results("stopped", 0.0))
            self._written = time.perf_counter()

    def _look_back(self) -> None:
        """Warn of scripted crashes that never happened, and of a network that all agents left."""
        for point in self._driver.spared:
            self._warn(
                f"{point.entry}: this crash never happened: {point.agent} did not reach {point.on!r} in round "
                f"{point.round}"
            )
        if self._driver.deserted:
            done = max((row.round for row in self._rows), default=0)
            self._warn(
                f"nobody is left at {self._driver.clock.now:g} s: all agents have crashed or left for good, "
                + (f"the last round that any of them completed is {done}" if done else "and none completed a round")
            )

    def _results(self, status: str, wall_s: float) -> Results:
        scenario = self._scenario
        sent, received = self._network.sent, self._network.received
        # bytes of a round may move after it was closed: late readers, agents that come back
        rows = [
            row.model_copy(
                update={
                    "bytes_sent": sent[row.agent, row.round],
                    "bytes_received": received[row.agent, row.round],
                }
            )
            for row in self._rows
        ]
        return Results(
            version=__version__,
            run=self._config.run,
            method=self._config.merge.method,
            seed=self._config.seed,
            status=status,
            config=describe(self._config),
            agents=list(scenario.agents),
            edges=list(scenario.schedule.edges()),
            metric=scenario.task.metric,
            classes=list(scenario.task.classes),
            histogram={agent: list(row) for agent, row in scenario.histogram.items()},
            parameters=scenario.parameters,
            snapshot_bytes=scenario.snapshot_bytes,
            rows=rows,
            warnings=self._warnings,
            wall_s=wall_s,
            cpu_s=dict(self._learners.cpu_s),
        )

    def _warn(self, message: str) -> None:
        if message not in self._warnings:
            self._warnings.append(message)
            self._emit(events.Warned(message=message))

    def _emit(self, event: E) -> E:
        """Tell the listeners an event; return it as they are told it."""
        stamped = replace(event, run=self._config.run, time_s=self._driver.clock.now)
        if isinstance(stamped, events.AgentEvent):
            self._views[stamped.agent].take(stamped)
        for listener in self.listeners:
            listener(stamped)
        return stamped


def _readers(schedule: RunSchedule) -> Callable[[str, int], Sequence[str]]:
    """Return who is told of an agent's snapshot of a round: who merges it; in asynchronous mode all who ever hear the
    agent, since the newest snapshot counts there in whatever round."""
    if schedule.config.schedule.mode == "sync":
        return schedule.readers
    hearing: dict[str, list[str]] = {agent: [] for agent in schedule.agents}
    for reader in schedule.agents:
        for peer in schedule.plan(reader).peers:
            hearing[peer].append(reader)
    return lambda agent, number: hearing[agent]


def consensus_distances(files: Mapping[str, Path]) -> dict[str, float]:
    """Return ‖θ_i − θ̄‖₂ / ‖θ̄‖₂ for each agent i, over all floating-point tensors.

    Θ̄ is the mean of the agents; where models are unlike, of those with the same one.

    Read tensor by tensor from safetensors files: one tensor per agent is in memory.
    """
    alike: dict[str, dict[str, Path]] = {}
    for name, path in files.items():
        with open_tensors(path, "", LONGEST_HEADER) as file:
            alike.setdefault(str([(key, file.info(key)) for key in file]), {})[name] = path
    found = {name: distance for group in alike.values() for name, distance in _distances(group).items()}
    return {name: found[name] for name in files}


def _distances(files: Mapping[str, Path]) -> dict[str, float]:
    squares = dict.fromkeys(files, 0.0)
    mean_square = 0.0
    with ExitStack() as stack:
        opened = {name: stack.enter_context(open_tensors(path, "", LONGEST_HEADER)) for name, path in files.items()}
        for tensor_name in next(iter(opened.values())):
            tensors = [file[tensor_name] for file in opened.values()]
            if not tensors[0].is_floating_point():
                continue
            stacked = torch.stack([t.double().flatten() for t in tensors])
            mean = stacked.mean(0)
            mean_square += float(mean @ mean)
            for name, row in zip(opened, stacked - mean, strict=True):
                squares[name] += float(row @ row)
    scale = mean_square**0.5 or 1.0
    return {name: square**0.5 / scale for name, square in squares.items()}
