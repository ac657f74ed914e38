"""What the protocol alone costs with many agents, and whether an agent's part of it grows with their number.

Agents on a ring with Metropolis weights, 50 rounds: the simulator's driver, round machines, messages, links and
network as in any run, while training is left out and weights are eight numbers. The merge really averages them, and
at the end all values are compared with W^rounds x. Reference: CPU-seconds per agent and round of 100 agents over as
many rounds, in the same run; both sizes take turns. One thread; imports and the making of agents are left out.

Python's garbage collector grows with what is alive, and is shown apart: 100 agents never make it look through all
objects in 50 rounds, 1,000 do several times. What was alive before a run (torch's modules above all, 226,000 objects)
is frozen, so that looking through it is not counted as the protocol's.
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from _common import Result, finish, options, table
from numpy.typing import NDArray

from dimat import events
from dimat.agent.protocol import messages as m
from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.plan import Plan, RoundPlan, Rules
from dimat.agent.protocol.round import RoundMachine
from dimat.agent.protocol.work import Outcome
from dimat.config import NetworkConfig, ScheduleConfig
from dimat.errors import DataError
from dimat.events import MergeResult, TrainResult
from dimat.seeds import numpy_generator
from dimat.simulate.driver import Driver, Node
from dimat.simulate.in_process_network import MemoryNetwork
from dimat.simulate.world.faults import FaultPlan
from dimat.simulate.world.link_model import Links
from dimat.topology import Schedule, Setting, build_graph, make_schedule
from dimat.weights.snapshot import Manifest, Payload, RecordedSnapshot, checksum

FEW, MANY, MOST = 100, 1_000, 10_000
ROUNDS, ROUNDS_OF_MOST = 50, 10
SIZE = 8
WALL_S, MEMORY_MB, GROWTH = 60, 2_000, 1.5

Weights = NDArray[np.float64]


class MemoryStore:
    """Snapshots by their blake3 address, in memory; an agent's newest two are held, and those that are read."""

    def __init__(self, keep: int = 2) -> None:
        self._keep = keep
        self._data: dict[str, bytes] = {}
        self._holds: Counter[str] = Counter()
        self._published: defaultdict[str, list[Manifest]] = defaultdict(list)

    def record(self, data: bytes) -> Payload:
        payload = checksum(data)
        self._data[payload.root] = data
        return payload

    def publish(self, manifest: Manifest) -> None:
        held = self._published[manifest.agent]
        held.append(manifest)
        self.hold(manifest.payload.root)
        while len(held) > self._keep:
            self.release(held.pop(0).payload.root)

    def offered(self, agent: str) -> Sequence[Manifest]:
        return self._published[agent]

    def find(self, agent: str, round_: int) -> Manifest | None:
        return next((manifest for manifest in self._published[agent] if manifest.round == round_), None)

    def verify(self, payload: Payload) -> Weights:
        data = self._data[payload.root]
        if checksum(data) != payload:
            raise DataError(f"snapshot {payload.root} is damaged")
        return np.frombuffer(data)

    def hold(self, root: str) -> None:
        self._holds[root] += 1

    def release(self, root: str) -> None:
        self._holds[root] -= 1
        if not self._holds[root]:
            del self._holds[root], self._data[root]


class Averaging:
    """Work of one agent without training: a round's merge is the weighted average of the snapshots, as they came."""

    def __init__(self, values: Weights, store: MemoryStore) -> None:
        self.values = values
        self._store = store

    def train_s(self, action: m.Train, now: float) -> float:
        return 1.0

    def merge_s(self, action: m.MergeAction) -> float:
        return 0.0

    def train(self, action: m.Train) -> Outcome[TrainResult]:
        return TrainResult

    def record(self, action: m.Train) -> Outcome[RecordedSnapshot]:
        data = self.values.tobytes()
        return lambda: RecordedSnapshot(self._store.record(data), (), "eight numbers", 0)

    def checkpoint(self, action: m.CheckpointAction) -> Outcome[None]:
        return lambda: None

    def merge(self, action: m.MergeAction, sources: Mapping[str, Weights]) -> Outcome[MergeResult]:
        merged = action.own_weight * self.values
        for part in action.parts:
            merged += part.weight * sources[part.peer]
        self.values = merged
        return MergeResult

    def restore(self) -> Outcome[None]:
        raise NotImplementedError("nobody crashes here")

    def crash(self) -> None:
        raise NotImplementedError("nobody crashes here")

    def adopt_basis(self, action: m.AdoptBasis, source: Weights) -> Outcome[m.Moves | None]:
        raise NotImplementedError("all share one basis here")

    def adopt_weights(self, action: m.AdoptWeights, source: Weights) -> Outcome[str]:
        raise NotImplementedError("nobody joins late here")


class Network:
    """Agents on a ring, ready to run `rounds` rounds. `told`: how many facts of each kind the driver told."""

    def __init__(self, agents: int, rounds: int) -> None:
        names = tuple(f"agent-{i}" for i in range(agents))
        self.rounds = rounds
        self.schedule: Schedule = make_schedule(Setting(names, build_graph("ring", names)))
        self.start = numpy_generator(0, "protocol-scale").standard_normal((agents, SIZE))
        self.told: Counter[type[events.Event]] = Counter()
        store = MemoryStore()
        self._work = {name: Averaging(start, store) for name, start in zip(names, self.start, strict=True)}
        rules = Rules.of(ScheduleConfig(), rounds=rounds, deadline_s=600.0)
        self._driver = Driver(
            "scale",
            {name: self._node(name, rules) for name in names},
            MemoryNetwork(store),
            Links(NetworkConfig(), names, 0),
            FaultPlan(),
            self._tell,
            lambda agent, number: self.schedule.out_neighbours(number, agent),
        )

    def _node(self, name: str, rules: Rules) -> Node:
        peers = frozenset(self.schedule.in_neighbours(1, name))
        plan = Plan(peers, lambda number: RoundPlan(self.schedule.row(number, name)))
        return Node(
            plan, lambda _, __: RoundMachine(name, "scale", plan, rules, basis=BasisId(0, name, "0")), self._work[name]
        )

    def _tell(self, fact: events.Event) -> None:
        self.told[type(fact)] += 1

    def run(self) -> None:
        self._driver.run()

    def error(self) -> float:
        """Return how far any value is from W^rounds x; raises where a round did not go as planned."""
        expected, matrix = self.start, self.schedule.sparse_mixing(1)
        for _ in range(self.rounds):
            expected = matrix @ expected
        merges = self.told[events.Merged]
        if merges != self.rounds * len(self.start) or self.told[events.SnapshotFetched] != 2 * merges:
            raise RuntimeError(f"not every agent merged two peers in every round: {dict(self.told)}")
        return float(np.abs(np.stack(list(self._work.values.values())) - expected).max())


@dataclass(frozen=True)
class Measured:
    """One run: `memory_mb` is the most that the process ever held until then; `collector_s`: CPU-seconds of the garbage
    collector, part of `cpu_s`."""

    agents: int
    rounds: int
    wall_s: float
    cpu_s: float
    memory_mb: float
    collector_s: float

    @property
    def each_us(self) -> float:
        """CPU-microseconds per agent and round."""
        return 1e6 * self.cpu_s / (self.agents * self.rounds)


class Collector:
    """CPU-seconds of Python's garbage collector, while it is among `gc.callbacks`."""

    def __init__(self) -> None:
        self.cpu_s = 0.0
        self._began = 0.0

    def __call__(self, phase: str, info: Mapping[str, int]) -> None:
        if phase == "start":
            self._began = time.process_time()
        else:
            self.cpu_s += time.process_time() - self._began


def measure(agents: int, rounds: int) -> Measured:
    network, collector = Network(agents, rounds), Collector()
    gc.collect()
    gc.freeze()
    gc.callbacks.append(collector)
    wall, cpu = time.perf_counter(), time.process_time()
    network.run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    gc.callbacks.remove(collector)
    gc.unfreeze()
    error = network.error()
    if not error < 1e-9:
        raise RuntimeError(f"values of {agents} agents are {error:.3g} away from W^{rounds} x")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Measured(agents, rounds, wall, cpu, memory, collector.cpu_s)


def main() -> None:
    arguments = options(__doc__.splitlines()[0]).parse_args()
    rounds, repeats = (10, 1) if arguments.quick else (ROUNDS, 3)
    measure(FEW, 2)  # once uncounted: lazy imports, allocator, caches
    runs: list[Measured] = []
    for _ in range(repeats):
        runs += [measure(FEW, rounds) for _ in range(3)]
        runs.append(measure(MANY, rounds))
    few, many = ([run for run in runs if run.agents == n] for n in (FEW, MANY))
    reference = statistics.median(run.each_us for run in few)
    measured = statistics.median(run.each_us for run in many)
    if not arguments.quick:
        runs.append(measure(MOST, ROUNDS_OF_MOST))
    headers = ("agents", "rounds", "wall s", "CPU s", "of it collector", "peak MB", "CPU us per agent-round", "ratio")
    rows: list[list[object]] = [
        [r.agents, r.rounds, r.wall_s, r.cpu_s, r.collector_s, round(r.memory_mb), round(r.each_us, 1)] for r in runs
    ]
    table(headers, [[*row, run.each_us / reference] for row, run in zip(rows, runs, strict=True)])
    ratio = measured / reference
    met = ratio <= GROWTH and all(run.wall_s <= WALL_S and run.memory_mb <= MEMORY_MB for run in many)
    finish(Result("protocol_scale", measured, reference, ratio, f"<= {GROWTH}", met))


if __name__ == "__main__":
    main()
