"""Parts of a network that were apart and meet again. Reference: they merge with everybody again within three deadlines,
however far apart their rounds are, and nobody spends a deadline on whoever is out of step."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from dimat import events
from dimat.agent.protocol import messages as m
from dimat.agent.protocol.round import Phase
from tests.faults.node import Node
from tests.faults.schedule import Edges, Fault, Map, Schedule
from tests.faults.world import World

DEADLINE_S = 20.0
CUT_S = 5.0


class Observed(World):
    """Writes down who merged whom, and whose deadline passed while it waited."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule)
        self.merges: list[tuple[float, str, int, frozenset[str]]] = []
        self.waited: list[tuple[float, str]] = []
        self.skipped: list[tuple[float, str, int]] = []

    def step(self, node: Node, event: m.Event, *, idle: bool = False) -> None:
        machine = node.machine
        waits = isinstance(event, m.Deadline) and machine is not None and machine.phase is Phase.GATHERING
        if waits and machine is not None and event.round == machine.round:
            self.waited.append((self.now, node.name))
        super().step(node, event, idle=idle)

    def perform(self, node: Node, action: m.Action) -> None:
        if isinstance(action, m.MergeAction):
            self.merges.append((self.now, node.name, action.round, frozenset(part.peer for part in action.parts)))
        if isinstance(action, m.Emit) and isinstance(action.fact, events.RoundsSkipped):
            self.skipped.append((self.now, node.name, action.fact.round - action.fact.first))
        super().perform(node, action)


@dataclass
class Meeting:
    """After two parts have met: `whole_s`, until all merge with all their neighbours in each round; `waits`: deadlines
    that passed since then in waiting, by agent; `gap`: rounds between the parts when they met."""

    whole_s: float
    waits: dict[str, int]
    gap: int


def meet(edges: Edges, apart: tuple[int, ...], slow: dict[int, float], cut_s: float, *, told: bool) -> Meeting:
    """Cut agents off, heal, and let everybody go on."""
    agents = 1 + max(max(edge) for edge in edges)
    rest = tuple(agent for agent in range(agents) if agent not in apart)
    heal = CUT_S + cut_s
    schedule = Schedule(
        seed=1,
        profile="rejoining",
        agents=agents,
        maps=(Map((edges,)),),
        rules={"rounds": None, "deadline_s": DEADLINE_S, "basis_gossip": True, "join": "align", "join_wait_s": 2.0},
        message_s=(0.01, 0.1),
        train_s=(0.9, 1.1),
        fetch_s=(0.01, 0.1),
        slow=tuple(slow.items()),
        keep=2,
        faults=(Fault("cut", at=CUT_S, until=heal, groups=(apart, rest), told=told),),
        quiet_s=heal + 8 * DEADLINE_S,
        settle=3,
    )
    world = Observed(schedule)
    world.run()
    rounds = {
        node.name: max(r for t, of, r, _ in world.merges if of == node.name and t <= heal) for node in world.nodes
    }
    there, here = ([rounds[f"a{agent}"] for agent in group] for group in (apart, rest))
    gap = max(abs(a - b) for a in there for b in here)
    alone = [t for t, of, _, peers in world.merges if t > heal and peers != world.by_name[of].plan.peers]
    until = world.schedule.quiet_s
    assert not [t for t in alone if t > until - DEADLINE_S], "not whole again before the end"
    waits = [of for t, of in world.waited if heal < t < until]
    return Meeting(max(alone, default=heal) - heal, {of: waits.count(of) for of in set(waits)}, gap)


def complete(agents: int) -> Edges:
    return tuple((i, j) for i in range(agents) for j in range(i + 1, agents))


def ring(agents: int) -> Edges:
    return tuple(sorted((min(e), max(e)) for e in ((i, (i + 1) % agents) for i in range(agents))))


CASES = {
    "one of three behind": (complete(3), (0,), {0: 5.0}),
    "one of three ahead": (complete(3), (0,), {1: 3.0, 2: 3.0}),
    "one of a pair behind": (complete(2), (0,), {0: 5.0}),
    "one of five behind": (complete(5), (0,), {0: 4.0}),
    "one of five ahead": (complete(5), (0,), dict.fromkeys(range(1, 5), 4.0)),
    "two of five behind": (complete(5), (0, 1), {0: 4.0, 1: 4.0}),
    "half of a path behind": (tuple((i, i + 1) for i in range(5)), (0, 1, 2), dict.fromkeys(range(3), 3.0)),
    "half of a ring behind": (ring(6), (0, 1, 2), dict.fromkeys(range(3), 3.0)),
    "one of a ring behind": (ring(5), (0,), {0: 4.0}),
    "equally fast": (complete(3), (0,), {}),
    "equally fast, on a ring": (ring(5), (0,), {}),
}


@pytest.mark.parametrize(("cut_s", "told"), [(15.0, True), (60.0, False), (60.0, True), (150.0, False)])
@pytest.mark.parametrize("case", CASES)
def test_whole_again_within_three_deadlines(case: str, cut_s: float, told: bool) -> None:
    """Whatever the gap, whoever is ahead: no deadline passes in waiting, and all are together again."""
    edges, apart, slow = CASES[case]
    meeting = meet(edges, apart, slow, cut_s, told=told)
    assert not meeting.waits, meeting
    assert meeting.whole_s <= 3 * DEADLINE_S, meeting
