"""Crashes, leaves and joins of agents and snapshots in whole runs, by hand: times, bytes, addresses in virtual time."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

from dimat import events
from dimat.agent.learner.checkpoint import Checkpoint
from dimat.agent.learner.checkpoint_store import CheckpointStore
from dimat.errors import DataError
from dimat.events import Event
from dimat.results import Results
from dimat.simulate import run_simulation
from dimat.simulate.world.scenario import prepare
from tests.simulate.helpers import tiny_experiment

RING = {"graph": "ring", "agents": 4}


def run(folder: Path, **changes: Any) -> tuple[Results, list[Event]]:
    """Four agents on a ring, method "average", rounds of 1 s, 0.05 s from agent to agent."""
    tree: dict[str, Any] = {"merge__method": "average", "topology": RING, "simulate__network": {"latency_s": 0.05}}
    heard: list[Event] = []
    return run_simulation(tiny_experiment(folder, **{**tree, **changes}), listeners=[heard.append]), heard


def told(heard: list[Event], kind: type[Event]) -> list[Any]:
    return [fact for fact in heard if isinstance(fact, kind)]


def at(kind: str, agent: str, time_s: float, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "agent": agent, "at_s": time_s, **more}


def on(moment: str, agent: str, number: int, **more: Any) -> dict[str, Any]:
    return {"kind": "crash", "agent": agent, "round": number, "on": moment, **more}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("stage", ["joined", "trained", "merged"])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path: Path, stage: str, workers: int) -> None:
    """Reference: DESIGN.md, "what training produced is durable before it is published": exit code 5, and nothing is
    published that is not on disk. The disk is a folder that cannot be made, or one that becomes a file."""
    fault = at("crash", "agent-3", 50.0, restart_after_s=1.0)
    config = tiny_experiment(
        tmp_path,
        merge__method="average",
        topology=RING,
        simulate={"faults": [fault], "workers": workers, "network": {"latency_s": 0.05}},
    )
    out, heard = tmp_path / "run", list[Event]()

    def listen(fact: Event) -> None:
        heard.append(fact)
        mine = out / "checkpoints" / "agent-1"
        ready = {"joined": events.RunStarted, "trained": events.Trained, "merged": events.Merged}[stage]
        if isinstance(fact, ready) and getattr(fact, "agent", "agent-1") == "agent-1" and not mine.is_file():
            shutil.rmtree(mine, ignore_errors=True)
            mine.parent.mkdir(exist_ok=True)
            mine.write_text("in the way")

    with pytest.raises(DataError, match=r"work of agent-1: .*checkpoints/agent-1") as caught:
        run_simulation(config, out=out, listeners=[listen])
    assert caught.value.exit_code == 5
    published = [fact.round for fact in told(heard, events.Published) if fact.agent == "agent-1"]
    assert published == ([1] if stage == "merged" else [])


def test_checkpoints_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the clock that the worker reads, here one that says 1 s for each checkpoint beyond what is written."""
    import dimat.simulate.engines.worker as worker

    saved: list[Checkpoint] = []
    write = CheckpointStore.save

    def save(self: CheckpointStore, checkpoint: Checkpoint) -> Path:
        saved.append(checkpoint)
        return write(self, checkpoint)

    monkeypatch.setattr(CheckpointStore, "save", save)
    ticks = iter(range(10_000))
    monkeypatch.setattr(worker.time, "thread_time", lambda: float(next(ticks)))
    fault = at("crash", "agent-3", 50.0, restart_after_s=1.0)
    results, _ = run(tmp_path, simulate__faults=[fault], simulate__evaluate="none", schedule={"rounds": 2})
    assert len(saved) == 4 * 5
    # one tick for each checkpoint, and one for each of the weights that are saved after a merge
    assert results.cpu_s["checkpoint"] >= 4 * 5 + 4 * 2


@pytest.mark.parametrize(("agents", "keep"), [(8, 1), (16, 2)])
def test_equal_snapshots_are_not_let_go_under_another_agent(tmp_path: Path, agents: int, keep: int) -> None:
    """Reference: the uninterrupted run. After the final merge's first rounds agents hold equal weights, so their
    snapshots have one address; an agent that is down between recording and publishing still finds its own."""
    tree: dict[str, Any] = {
        "topology": {"graph": "ring", "agents": agents},
        "schedule": {"rounds": 1, "final_merge": True, "round_deadline_s": 60.0},
        "simulate__keep_snapshots": keep,
        "simulate__evaluate": "none",
    }
    plain, _ = run(tmp_path, **tree)
    end = max(row.round for row in plain.rows)
    for agent in ("agent-0", "agent-5"):
        for number in (3, end):
            fault = on("publish", agent, number, restart_after_s=5.0)
            results, heard = run(tmp_path, **tree, simulate__faults=[fault])
            assert told(heard, events.AgentCrashed)
            assert not told(heard, events.PeerLate)
            last = {r.agent: r.consensus_distance for r in results.rows if r.round == end}
            assert last == {r.agent: r.consensus_distance for r in plain.rows if r.round == end}


def test_agents_hear_of_their_sources_only(tmp_path: Path) -> None:
    """Reference: the edges. On a directed ring with push-sum, whose weights never repeat, nobody hears its reader: not
    as planned, and not when a connection is made anew after a crash."""
    graph = "import networkx as nx\n\ndef graph():\n    names = [f'agent-{i}' for i in range(4)]\n"
    (tmp_path / "ring.py").write_text(graph + "    return nx.cycle_graph(names, create_using=nx.DiGraph)\n")
    fault = at("crash", "agent-1", 1.5, restart_after_s=0.2)
    config = tiny_experiment(
        tmp_path,
        merge__method="sgp",
        topology={"python": "ring.py:graph"},
        simulate={"faults": [fault], "trace": True, "workers": 1},
    )
    scenario = prepare(config)
    ring = nx.cycle_graph([f"agent-{i}" for i in range(4)], create_using=nx.DiGraph)
    for agent in ring:
        assert scenario.schedule.plan(agent).peers == set(ring.predecessors(agent))

    run_simulation(config, out=tmp_path / "run")
    heard = set[tuple[str, str]]()
    for line in (tmp_path / "run" / "trace.jsonl").read_text().splitlines():
        step = json.loads(line)
        if step.get("event", {}).get("kind") == "PeerPublished":
            heard.add((step["event"]["peer"], step["agent"]))
    assert heard == set(ring.edges())


def test_whoever_waits_behind_an_abandoned_transfer_moves_up(tmp_path: Path) -> None:
    """By hand: the middle of a star sends one snapshot a second and has three readers. The first of them goes when its
    own is half through, and the others' arrive half a second earlier than without that."""
    star = {"graph": "star", "agents": 4}
    size = prepare(tiny_experiment(tmp_path, merge__method="average", topology=star)).snapshot_bytes
    network = {"links": [{"between": ["agent-0", f"agent-{i}"], "bandwidth_mbit_s": 1e6} for i in (1, 2, 3)]}
    network |= {"uplink_mbit_s": size / 125_000}
    times: list[dict[str, float]] = []
    for faults in ([], [at("leave", "agent-1", 1.5)]):
        _, heard = run(
            tmp_path,
            topology=star,
            schedule={"rounds": 1},
            simulate={"faults": faults, "network": network, "workers": 1},
        )
        times.append({f.agent: f.time_s for f in told(heard, events.SnapshotFetched) if f.peer == "agent-0"})
    assert times[0] == pytest.approx({"agent-1": 2, "agent-2": 3, "agent-3": 4})
    assert times[1] == pytest.approx({"agent-2": 2.5, "agent-3": 3.5})


def test_bytes_of_what_breaks_off_are_those_that_were_sent(tmp_path: Path) -> None:
    """Law: what is held is never sent again (DESIGN.md). A transfer of 1 s that partitions break off three times costs
    its own size and, each time, what was on the 0.01 s of its way."""
    pair = {"graph": "complete", "agents": 2}
    size = prepare(tiny_experiment(tmp_path, merge__method="average", topology=pair)).snapshot_bytes
    cuts = [
        {"kind": "partition", "at_s": 1.2 + 0.4 * i, "groups": [["agent-0"]], "heal_after_s": 0.2} for i in range(3)
    ]
    network = {"latency_s": 0.01, "bandwidth_mbit_s": size / 125_000}
    results, heard = run(
        tmp_path,
        topology=pair,
        schedule={"rounds": 1, "round_deadline_s": 60.0},
        simulate={"faults": cuts, "network": network, "workers": 1},
    )
    for row in results.rows:
        assert row.bytes_received == row.bytes_sent == pytest.approx(size * 1.03, rel=1e-3)
    assert [f.bytes for f in told(heard, events.SnapshotFetched)] == [row.bytes_received for row in results.rows]


def test_bytes_of_what_is_given_up_are_those_that_were_sent(tmp_path: Path) -> None:
    """By hand: snapshots take 4 s, and 2 s after training the deadline ends the wait for them: half is sent."""
    pair = {"graph": "complete", "agents": 2}
    size = prepare(tiny_experiment(tmp_path, merge__method="average", topology=pair)).snapshot_bytes
    results, heard = run(
        tmp_path,
        topology=pair,
        schedule={"rounds": 1, "round_deadline_s": 2.0},
        simulate={"network": {"bandwidth_mbit_s": size / 125_000 / 4}, "workers": 1},
    )
    assert not told(heard, events.SnapshotFetched)
    assert [row.bytes_received for row in results.rows] == [size // 2] * 2


def test_only_its_own_restart_brings_a_crashed_agent_back(tmp_path: Path) -> None:
    """Reference: `FaultPlan`. An agent that a crash point takes down for good stays away, whatever random or scripted
    crashes, with their restarts, are to strike it later."""
    simulate = {
        "faults": [on("merge", "agent-1", 2), at("crash", "agent-1", 20.0, restart_after_s=1.0)],
        "random_faults": {"crashes_per_hour": 600.0, "mean_down_s": 1.0, "until_s": 40.0},
        "workers": 1,
    }
    results, heard = run(tmp_path, schedule={"rounds": 20, "round_deadline_s": 3.0}, simulate=simulate)
    gone = next(f.time_s for f in told(heard, events.AgentCrashed) if f.agent == "agent-1" and f.back_s is None)
    assert not [f for f in heard if f.time_s > gone and getattr(f, "agent", "") == "agent-1"]
    assert [s.round for s in told(heard, events.RoundSummary)] == sorted({row.round for row in results.rows})


def test_a_run_ends_when_everybody_is_through(tmp_path: Path) -> None:
    """By hand: two rounds of 1 s without latency, whatever faults are still to come. 40,000 of them are no burden."""
    chance = {"crashes_per_hour": 20.0, "mean_down_s": 5.0, "until_s": 2e6}
    _, heard = run(
        tmp_path, schedule={"rounds": 2}, simulate={"random_faults": chance, "workers": 1, "evaluate": "none"}
    )
    assert not told(heard, events.AgentCrashed)
    assert heard[-1].time_s == 2.0


@pytest.mark.parametrize("at_s", [2.2, 1.5, 0.0])
def test_a_leave_costs_the_others_no_deadline(tmp_path: Path, at_s: float) -> None:
    """By hand: rounds of 1 s and 0.15 s of travel. Neighbours hear that an agent leaves, also those that are about to
    fetch what it no longer serves (at 2.2 s), and wait for nothing of it."""
    results, heard = run(tmp_path, simulate__faults=[at("leave", "agent-1", at_s)])
    assert max(row.time_s for row in results.rows) == pytest.approx(3 * 1.15, abs=0.2)
    assert {(f.agent, f.peer) for f in told(heard, events.PeerLate)} == {("agent-0", "agent-1"), ("agent-2", "agent-1")}
    assert {f.reason.split(" (")[0] for f in told(heard, events.PeerLate)} == {"it has left"}


def test_who_leaves_while_down_is_told_to_have_left(tmp_path: Path) -> None:
    """Reference: the rounds of all others, which close without it at once; it does not come back."""
    faults = [on("merge", "agent-1", 1, restart_after_s=30.0), at("leave", "agent-1", 2.0)]
    _, heard = run(tmp_path, simulate__faults=faults, schedule={"rounds": 3, "round_deadline_s": 5.0})
    (left,) = [f for f in told(heard, events.AgentLeft) if f.agent == "agent-1"]
    assert (left.time_s, left.reason) == (2.0, "left")
    assert not told(heard, events.Resumed)
    assert heard[-1].time_s < 20
    assert next(s.time_s for s in told(heard, events.RoundSummary) if s.round == 1) == 2.0


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ([on("train", f"agent-{i}", 1) for i in range(4)], "and none completed a round"),
        ([at("leave", f"agent-{i}", 0.0) for i in range(4)], "and none completed a round"),
        ([at("crash", f"agent-{i}", 2.0) for i in range(4)], "the last round that any of them completed is 1"),
    ],
)
def test_a_run_that_nobody_survives_says_so(tmp_path: Path, faults: list[dict[str, Any]], said: str) -> None:
    """Reference: the faults. One line, rather than an empty table without a word."""
    results, heard = run(tmp_path, simulate__faults=faults)
    assert [w for w in results.warnings if w.startswith("nobody is left") and w.endswith(said)]
    assert Counter(type(f) for f in heard)[events.RunFinished] == 1


def test_a_crash_that_never_came_about_is_told(tmp_path: Path) -> None:
    """By hand: a newcomer that joins in round 3 or later never trains in round 1."""
    faults = [at("join", "agent-1", 2.5), on("train", "agent-1", 1, restart_after_s=1.0)]
    results, heard = run(tmp_path, simulate__faults=faults, schedule={"rounds": 6, "round_deadline_s": 5.0})
    assert not told(heard, events.AgentCrashed)
    assert [w for w in results.warnings if w.startswith("simulate.faults[1]: this crash never happened")]
