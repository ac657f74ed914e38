"""The state behind the page. References: the events that were told, and the law that what is told bit by bit adds up to
what is told at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dimat.events import (
    AgentCrashed,
    AgentLeft,
    AgentStarted,
    Contribution,
    Event,
    Merged,
    MergeResult,
    PeerLate,
    RoundFinished,
    RoundStarted,
    RunStarted,
    SnapshotFetched,
    Trained,
    TrainResult,
)
from dimat.ui.dashboard import model as known
from dimat.ui.dashboard.api import StateApi
from dimat.ui.dashboard.reducer import RunState
from tests.ui.dashboard.runs import told

Values = dict[str, Any]
PLAIN = [event.to_dict() for event in told()]
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def taken(events: Sequence[Event | Mapping[str, Any]]) -> RunState:
    state = RunState()
    state.take_all(event.to_dict() if isinstance(event, Event) else event for event in events)
    return state


def merged(
    agent: str, number: int, after: float, *peers: str, time_s: float = 0.0, heard: int = 0, **more: Any
) -> Merged:
    parts = tuple(Contribution(agent=who, snapshot="s", round=number, weight=0.5) for who in (agent, *peers))
    result = MergeResult(after={"accuracy": after}, **more)
    return Merged(
        agent=agent, round=number, contributions=parts, result=result, time_s=time_s, heard=heard, expected=heard
    )


def finished(agent: str, number: int, after: float, *peers: str, **more: Any) -> RoundFinished:
    """Return the end of a round that merged as `merged` has it."""
    merge = merged(agent, number, after, *peers)
    common = {"heard": 0, "expected": 0, "bytes_sent": 4, "bytes_received": 400, "after": {"accuracy": after}}
    return RoundFinished(agent=agent, round=number, contributions=merge.contributions, **{**common, **more})


class Client:
    """Puts together what it is told, as the page does (static/store.js)."""

    def __init__(self) -> None:
        self.version = 0
        self.agents: dict[str, Values] = {}
        self.edges: dict[tuple[str, str], list[Any]] = {}
        self.curves: dict[str, dict[int, list[Any]]] = {}
        self.means: dict[int, list[Any]] = {}
        self.log: dict[int, list[Any]] = {}

    def apply(self, news: Values) -> None:
        news = json.loads(json.dumps(news, allow_nan=False))
        assert news["since"] == self.version
        self.version = news["version"]
        self.agents |= {agent["name"]: agent for agent in news["agents"]}
        self.edges |= {(edge[0], edge[1]): edge for edge in news["edges"]}
        for name, rows in news["curves"].items():
            self.curves.setdefault(name, {}).update({row[0]: row for row in rows})
        self.means |= {row[0]: row for row in news["means"]}
        self.log |= {row[0]: row for row in news["log"]}
        newest = sorted(self.log.values(), key=lambda row: (row[1], row[0]))[-known.MOST_LOG :]
        self.log = {row[0]: row for row in newest}

    def all(self) -> tuple[Any, ...]:
        return self.agents, self.edges, self.curves, self.means, self.log


@given(st.lists(st.sampled_from(PLAIN), max_size=60), st.data())
def test_bit_by_bit_as_at_once(events: list[Values], data: st.DataObject) -> None:
    """Whatever the order, and however often an event comes: a reader that is told what is new, at any moments, knows
    what one knows that is told everything at the end."""
    state = RunState()
    shown, reader = StateApi(state), Client()
    for event in events:
        state.take(event)
        if data.draw(st.booleans()):
            state.refresh(100.0)
            reader.apply(shown.since(reader.version))
    state.refresh(200.0)
    reader.apply(shown.since(reader.version))
    late = Client()
    late.apply(shown.since(0))
    assert reader.all() == late.all()
    again = Client()
    fresh = taken(events)
    fresh.refresh(200.0)
    again.apply(StateApi(fresh).since(0))
    for one, other in zip(late.all()[1:4], again.all()[1:4]):
        assert one == other
    assert {name: {**a} for name, a in late.agents.items()} == again.agents


@given(st.lists(st.tuples(st.sampled_from(PLAIN), st.text("eventagroundpeer_sti", max_size=14), ODD), max_size=25))
def test_fields_of_any_form(changes: list[tuple[Values, str, Any]]) -> None:
    """A field of another form, or one that is missing, is passed over: what is told is JSON all the same."""
    state = RunState()
    for event, key, value in changes:
        keys = sorted(event)
        state.take({**event, keys[len(key) % len(keys)]: value})
        state.take({k: v for k, v in event.items() if k != keys[len(key) % len(keys)]})
    state.refresh(1.0)
    shown = StateApi(state)
    json.dumps([shown.since(0), shown.merges(), shown.curves(state.agents), shown.adoptions([])], allow_nan=False)


@given(ODD, st.dictionaries(st.sampled_from(["peers", "merged", "trained", "round", "left", "phase"]), ODD))
def test_status_of_any_form(name: Any, status: Values) -> None:
    """A peer may say of itself what it likes."""
    state = taken(PLAIN)
    state.take_status("lab-z", {"peers": {"lab-a": name}, **status}, 1.0)
    state.refresh(1.0)
    json.dumps(StateApi(state).since(0), allow_nan=False)


def test_what_the_page_shows() -> None:
    state = taken(
        [
            RunStarted(
                method="dimat",
                seed=0,
                agents=("a", "b"),
                edges=(("a", "b"),),
                rounds=4,
                parameters=10,
                snapshot_bytes=40,
                histogram={"a": (3, 4)},
                run="r",
            ),
            RoundStarted(agent="a", round=1),
            Trained(agent="a", round=1, result=TrainResult(loss=0.5, samples=7), train_s=0.1),
            SnapshotFetched(agent="a", round=1, peer="b", snapshot="s", bytes=400),
            merged("a", 1, 0.75, "b", heard=1, before={"accuracy": 0.5}, accepted=0.5, notes=("n",)),
            finished(
                "a",
                1,
                0.75,
                "b",
                heard=1,
                expected=1,
                before={"accuracy": 0.5},
                accepted=0.5,
                notes=("n",),
                loss=0.5,
                late={"c": "deadline"},
                refused={"d": "nan"},
                time_s=5.0,
            ),
        ]
    )
    state.refresh(5.0)
    found = StateApi(state).since(0)
    run = found["run"]
    assert (run["name"], run["rounds"], run["metric"], run["simulated"]) == ("r", 4, "accuracy", True)
    a = next(agent for agent in found["agents"] if agent["name"] == "a")
    assert (a["state"], a["round"], a["metric"], a["before"], a["loss"]) == ("running", 1, 0.75, 0.5, 0.5)
    assert (a["sent"], a["received"], a["samples"], tuple(a["histogram"])) == (4, 400, 7, (3, 4))
    assert ["b", "a", 400, 1, 0, ""] in found["edges"]
    assert found["curves"]["a"] == [[1, 0.5, 0.5, 0.75]]
    assert found["means"] == [[1, 0.75, 0.75, 0.75, 0.5]]
    (row,) = StateApi(state).merges()["merges"]  # pyright: ignore[reportGeneralTypeIssues]
    assert (row["verdict"], row["notes"]) == ("50% accepted", ("n",))
    assert row["missing"] == {"c": "late", "d": "refused: nan"}
    assert row["parts"] == [("a", 1, 0.5, ""), ("b", 1, 0.5, "")]


def states(state: RunState, now: float) -> dict[str, str]:
    state.refresh(now)
    return {name: agent.state for name, agent in state.agents.items()}


def started(agent: str, *peers: str, time_s: float = 0.0, number: int = 0) -> AgentStarted:
    return AgentStarted(
        agent=agent, round=number, address="h:1", peers=peers, samples=1, parameters=1, secure=True, time_s=time_s
    )


def test_how_an_agent_is() -> None:
    """Silent, killed, asked in vain, back, behind, gone: each for its own reason."""
    state = taken([started("a", "b", time_s=100.0), started("b", "a", time_s=100.0)])
    assert states(state, 101.0) == {"a": "running", "b": "running"}
    state.take(RoundStarted(agent="a", round=1, time_s=150.0).to_dict())
    assert states(state, 190.0) == {"a": "running", "b": "lost"}, "no event for 90 s"
    state.take_status("b", {"round": 0}, 190.0)
    assert states(state, 190.0)["b"] == "running", "it answers, and so is only slow"
    state.take_status("b", None, 191.0)
    assert states(state, 191.0)["b"] == "lost"
    state.take(started("b", "a", time_s=192.0).to_dict())
    assert states(state, 192.0)["b"] == "running"
    state.take(PeerLate(agent="a", round=1, peer="b", time_s=193.0).to_dict())
    state.take(finished("a", 1, 0.5, time_s=193.0).to_dict())
    assert states(state, 193.0) == {"a": "running", "b": "late"}
    state.take(finished("a", 2, 0.5, "b", time_s=194.0).to_dict())
    assert states(state, 194.0)["b"] == "running"
    state.take(AgentLeft(agent="b", round=2, reason="done", time_s=195.0).to_dict())
    assert states(state, 1e6) == {"a": "lost", "b": "left"}


def test_an_agent_that_crashes_in_a_simulation_and_comes_back() -> None:
    state = taken([told()[0], RoundStarted(agent="lab-a", round=1, time_s=1.0)])
    state.take(AgentCrashed(agent="lab-a", round=1, back_s=9.0, time_s=2.0).to_dict())
    assert states(state, 0.0)["lab-a"] == "lost"
    assert "back after 9.0 s" in state.agents["lab-a"].why
    state.take(RoundStarted(agent="lab-a", round=1, time_s=11.0).to_dict())
    assert states(state, 0.0)["lab-a"] == "running"


def test_one_agents_view_of_its_peers() -> None:
    """Peers are known by the links to them, and by what they say of themselves."""
    state = taken([started("a", "b", "c", "d", time_s=1.0)])
    links = {
        "b": {"connected": True, "rounds": [3, 4], "received_bytes": 10},
        "c": {"connected": False, "trouble": "connection refused"},
        "d": {"connected": False, "trouble": "it has left (done)"},
    }
    state.take_status("a", {"round": 4, "phase": "training", "peers": links}, 2.0)
    assert states(state, 2.0) == {"a": "running", "b": "running", "c": "lost", "d": "left"}
    assert state.agents["b"].view.round == 4
    assert state.edges["b", "a"].bytes == 10
    said = {"round": 5, "phase": "merging", "merged": {"round": 4, "after": {"accuracy": 0.9}}, "peers": {"e": {}}}
    state.take_status("b", said, 3.0)
    assert state.agents["b"].view.finished.after["accuracy"] == 0.9
    assert states(state, 3.0)["e"] in ("lost", "unknown")


@pytest.mark.parametrize(
    ("name", "most", "event"),
    [
        ("MOST_AGENTS", 5, lambda i: started(f"a{i}")),
        ("MOST_EDGES", 5, lambda i: started("a", f"b{i}")),
        ("MOST_MERGES", 5, lambda i: finished("a", i, 0.5)),
        ("MOST_LOG", 5, lambda i: merged("a", i, 0.5, time_s=float(i))),
    ],
)
def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, name: str, most: int, event: Any) -> None:
    monkeypatch.setattr(known, name, most)
    state = taken([event(i) for i in range(40)])
    held = {
        "MOST_AGENTS": len(state.agents),
        "MOST_EDGES": len(state.edges),
        "MOST_MERGES": len(state.merges),
        "MOST_LOG": len(state.log),
    }
    assert held[name] == most
    if name == "MOST_LOG":
        assert sorted(entry.key[0] for entry in state.log) == [35.0, 36.0, 37.0, 38.0, 39.0]
    assert (state.left_out > 0) == (name in ("MOST_AGENTS", "MOST_EDGES"))


def test_long_curves_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "MOST_POINTS", 0)
    state = taken([finished("a", i, i / 1000) for i in range(1, 1001)])
    points = state.agents["a"].points
    assert len(points) <= known.LEAST_POINTS
    assert max(points) == 1000
    assert min(points) < 100, "the beginning is still there"


def test_a_peer_that_invents_agents_shows_none() -> None:
    """What a peer answers is told by whoever has its key: only members of the agent's own map are shown."""
    where: Values = {"address": "here:1", "peers": ("b",), "members": ("a", "b", "c")}
    state = taken([AgentStarted(agent="a", round=0, samples=1, parameters=1, secure=True, time_s=1.0, **where)])
    links: Values = {f"stranger-{number}": {"connected": True, "rounds": [9]} for number in range(50)}
    state.take_status("b", {"round": 2, "peers": {"c": {"connected": True, "rounds": [1]}} | links}, 2.0)
    assert set(state.agents) == {"a", "b", "c"}
    assert not any("stranger" in source or "stranger" in reader for source, reader in state.edges)
