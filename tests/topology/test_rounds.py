"""How far rounds drift apart: closed forms, and agents that are simulated one event at a time."""

from __future__ import annotations

import networkx as nx
import pytest

from dimat.topology import CycleSchedule, Schedule, Setting, build_graph, make_schedule
from dimat.topology.mixing import Mixer
from dimat.topology.rounds import longest_lead


def names(n: int) -> tuple[str, ...]:
    return tuple(f"a{i}" for i in range(n))


def one_way(n: int) -> CycleSchedule:
    graph = nx.DiGraph()
    graph.add_nodes_from(names(n))
    graph.add_edges_from((f"a{i}", f"a{(i + 1) % n}") for i in range(n))
    return CycleSchedule([graph], Mixer("uniform"))


@pytest.mark.parametrize("n", [2, 3, 6, 10])
def test_closed_forms(n: int) -> None:
    """Undirected and static: one round. A ring one way: the way back, n − 1; never more than was asked for."""
    assert longest_lead(make_schedule(Setting(names(n), build_graph("ring", names(n)))), 15) == 1
    assert longest_lead(one_way(n), 15) == n - 1
    assert longest_lead(one_way(n), 2) == min(n - 1, 2)


def run_ahead(schedule: Schedule, reader: int, publisher: int, first: int, most: int) -> int:
    """Let all go on as far as they can while `reader` has published round `first` and does not end it."""
    n = len(schedule.names)
    published = [first] * n
    moved = True
    while moved and max(published) < first + most:
        moved = False
        for agent in range(n):
            sources = schedule.links(published[agent]).sources[agent]
            if agent != reader and all(published[s] >= published[agent] for s in sources):
                published[agent] += 1
                moved = True
    return published[publisher] - first


@pytest.mark.parametrize("schedule", ["one-peer-exponential", "base-k", "random-matching", "one-way"])
def test_equals_what_a_stuck_reader_allows(schedule: str) -> None:
    """Law: the lead is the furthest that a publisher gets while its reader is stuck, by playing it."""
    n = 7
    made = one_way(n) if schedule == "one-way" else make_schedule(Setting(names(n), seed=3), schedule)
    played = max(
        run_ahead(made, reader, publisher, first, 15)
        for first in range(1, (made.period or 8) + 1)
        for reader in range(n)
        for publisher in made.links(first).sources[reader]
    )
    assert longest_lead(made, 15) == min(played, 15)
