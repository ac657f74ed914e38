"""Agents without training in the simulator's driver: real machines and messages, and weights of few numbers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from dimat import events
from dimat.agent.protocol import messages as m
from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.plan import Plan, PushShares, RoundPlan, Rules
from dimat.agent.protocol.push_sum import PushSum
from dimat.agent.protocol.round import RoundMachine
from dimat.agent.protocol.work import Outcome
from dimat.config import NetworkConfig, ScheduleConfig, TopologyConfig
from dimat.config.presets import PUSH_SUM
from dimat.events import MergeResult, TrainResult
from dimat.simulate.driver import Driver, Node
from dimat.simulate.in_process_network import MemoryNetwork
from dimat.simulate.world.faults import FaultPlan
from dimat.simulate.world.link_model import Links
from dimat.topology import CycleSchedule, Mixer, Schedule, build_topology
from dimat.weights.snapshot import Manifest, Payload, RecordedSnapshot, checksum

Values = NDArray[np.float64]
T = TypeVar("T")


class Store:
    """Snapshots in memory, by address; each agent's newest `keep` are offered, and none is forgotten."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._data: dict[str, bytes] = {}
        self._published: dict[str, list[Manifest]] = {}

    def record(self, data: bytes) -> Payload:
        payload = checksum(data)
        self._data[payload.root] = data
        return payload

    def publish(self, manifest: Manifest) -> None:
        self._published[manifest.agent] = [*self._published.get(manifest.agent, []), manifest][-self._keep :]

    def offered(self, agent: str) -> Sequence[Manifest]:
        return self._published.get(agent, [])

    def find(self, agent: str, round_: int) -> Manifest | None:
        return next((manifest for manifest in self.offered(agent) if manifest.round == round_), None)

    def verify(self, payload: Payload) -> Values:
        return np.frombuffer(self._data[payload.root])

    def hold(self, root: str) -> None:
        pass

    def release(self, root: str) -> None:
        pass


class Averaging:
    """Training changes nothing and takes between 0.5 and 1.5 virtual seconds; a merge is the weighted sum of what came.

    `merged[round]`, `ledgers[round]`: values and push-sum ledger after the merge (round 0: at first).
    """

    def __init__(self, agent: str, start: Values, store: Store, seed: int) -> None:
        self.merged = {0: start}
        self.ledgers = {0: PushSum()}
        self._values = start
        self._store = store
        self._random = random.Random(f"{seed} {agent}")

    def train_s(self, action: m.Train, now: float) -> float:
        return self._random.uniform(0.5, 1.5)

    def merge_s(self, action: m.MergeAction, now: float) -> float:
        return 0.0

    def train(self, action: m.Train) -> Outcome[TrainResult]:
        return TrainResult

    def record(self, action: m.Train) -> Outcome[RecordedSnapshot]:
        recorded = RecordedSnapshot(self._store.record(self._values.tobytes()), (), "numbers", 0)
        return lambda: recorded

    def checkpoint(self, action: m.CheckpointAction) -> Outcome[None]:
        if action.stage == "merged":
            self.ledgers[action.round] = PushSum.from_dict(action.state.push)
        return lambda: None

    def merge(self, action: m.MergeAction, sources: Mapping[str, Values]) -> Outcome[MergeResult]:
        merged = action.own_weight * self._values
        for part in action.parts:
            merged = merged + part.weight * sources[part.peer]
        self._values = self.merged[action.round] = merged
        return MergeResult

    def restore(self) -> Outcome[None]:
        raise NotImplementedError

    def crash(self) -> None:
        raise NotImplementedError

    def adopt_basis(self, action: m.AdoptBasis, source: Values) -> Outcome[m.Moves | None]:
        raise NotImplementedError

    def adopt_weights(self, action: m.AdoptWeights, source: Values) -> Outcome[str]:
        raise NotImplementedError


def make_schedule(
    agents: int = 6,
    *,
    graph: str | None = None,
    options: Mapping[str, Any] | None = None,
    edges: Sequence[Sequence[tuple[int, int]]] = (),
    directed: bool = True,
    schedule: str = "static",
    draws: Mapping[str, Any] | None = None,
    mixing: str = "metropolis",
    weights: Mapping[str, Any] | None = None,
    samples: Sequence[int] = (),
    seed: int = 0,
) -> Schedule:
    """Return a schedule as an experiment has it; `options` are the graph's, `draws` the schedule's, `weights` the
    mixing rule's. `edges`: one graph a round, directed or in parts, which experiments take from files only."""
    names = [f"agent-{i}" for i in range(agents)]
    if not edges:
        tree: dict[str, Any] = {"graph": graph, "options": options or {}, "agents": agents}
        tree["schedule"] = {"name": schedule, "options": draws or {}}
        tree["mixing"] = {"name": mixing, "options": weights or {}}
        counts = dict(zip(names, samples, strict=False))
        return build_topology(TopologyConfig(**tree), seed, samples=counts).schedule
    graphs = [nx.DiGraph() if directed else nx.Graph() for _ in edges]
    for one, links in zip(graphs, edges, strict=True):
        one.add_nodes_from(names)
        one.add_edges_from((names[i], names[j]) for i, j in links)
    return CycleSchedule(graphs, Mixer(mixing, weights or {}))


def round_plan(schedule: Schedule, agent: str, number: int) -> RoundPlan:
    """Return an agent's plan of a round as an experiment makes it; with mixing "push-sum" equal shares to itself and
    each reader, after the lazy one."""
    if not (isinstance(schedule, CycleSchedule) and schedule.mixer.name == PUSH_SUM):
        return RoundPlan(schedule.row(number, agent))
    readers = schedule.out_neighbours(number, agent)
    share = (1 - schedule.mixer.lazy) / (len(readers) + 1)
    heard = (agent, *schedule.in_neighbours(number, agent))
    shares = PushShares(1 - share * len(readers), dict.fromkeys(readers, share))
    return RoundPlan(dict.fromkeys(heard, 1.0), push=shares)


@dataclass(frozen=True)
class Run:
    """What came out; index 0 of each array is what was there at first, index r what is there after round r.

    `values[r, i]`: agent i's numbers; `weight[r, i]`: its push-sum weight; `late[r, i, j]`: push-sum weight that i has
    sent to j and that j has not taken in; `facts`: all that was told.
    """

    values: Values
    weight: Values
    late: Values
    facts: tuple[events.Event, ...]

    @property
    def spread(self) -> Values:
        """By round ‖x − mean‖, the Frobenius norm over agents and numbers."""
        return np.linalg.norm(self.values - self.values.mean(axis=1, keepdims=True), axis=(1, 2))


def run(
    schedule: Schedule,
    rounds: int,
    start: Values | None = None,
    *,
    network: NetworkConfig | None = None,
    deadline_s: float = 1e6,
    seed: int = 0,
    keep: int = 1_000,
) -> Run:
    """Run `rounds` rounds from `start` (n × d), by default the identity: the values then are the product of all mixing
    matrices so far."""
    names = schedule.names
    first = np.eye(len(names)) if start is None else start
    store = Store(keep)
    work = {agent: Averaging(agent, values, store, seed) for agent, values in zip(names, first, strict=True)}
    rules = Rules.of(ScheduleConfig(), rounds=rounds, deadline_s=deadline_s)
    told: list[events.Event] = []

    def node(agent: str) -> Node:
        plan = Plan(frozenset(schedule.peers(agent)), lambda number: round_plan(schedule, agent, number))
        return Node(
            plan, lambda _, __: RoundMachine(agent, "run", plan, rules, basis=BasisId(0, agent, "0")), work[agent]
        )

    Driver(
        "run",
        {agent: node(agent) for agent in names},
        MemoryNetwork(store),
        Links(network or NetworkConfig(), names, seed),
        FaultPlan(),
        told.append,
        lambda agent, number: schedule.out_neighbours(number, agent),
    ).run()
    ledgers = [_by_round(work[agent].ledgers, rounds) for agent in names]
    late = [
        [
            [mine.sent.get(b, 0.0) - theirs.taken.get(a, 0.0) for b, theirs in zip(names, row, strict=True)]
            for a, mine in zip(names, row, strict=True)
        ]
        for row in zip(*ledgers, strict=True)
    ]
    return Run(
        np.array([_by_round(work[agent].merged, rounds) for agent in names]).swapaxes(0, 1),
        np.array([[ledger.weight for ledger in row] for row in zip(*ledgers, strict=True)]),
        np.array(late),
        tuple(told),
    )


def _by_round(known: Mapping[int, T], rounds: int) -> list[T]:
    """Return what was known by round; in a round that an agent left out, what was of the round before."""
    found = [known[0]]
    for number in range(1, rounds + 1):
        found.append(known.get(number, found[-1]))
    return found
