"""Events from plain values, and folded into what is known of an agent. Reference: the events themselves; the fields of
their classes; for old logs the lines of tests/golden/old-run and the results that its version wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dimat import events
from dimat.events.parse import KINDS, parse_event
from dimat.events.view import AgentView
from dimat.json_text import finite, to_json
from dimat.results import read_results
from dimat.ui.dashboard.api import StateApi
from dimat.ui.dashboard.run_source import FolderSource
from dimat.ui.jsonl import JsonlListener
from dimat.ui.jsonl_read import HEADER, read_events

OLD = Path(__file__).parent / "golden" / "old-run"
LOGS = (OLD / "simulation", *(OLD / "agents" / "old-run" / name for name in ("lab-a", "lab-b", "lab-c")))
WHO: dict[str, Any] = {"run": "r", "agent": "a", "round": 2, "time_s": 5.0}
PARTS = (
    events.Contribution(agent="a", snapshot="s", round=2, weight=0.75, verdict="own"),
    events.Contribution(agent="b", snapshot="t", round=1, weight=0.25, verdict="other basis"),
)
ROUND = (
    events.RoundStarted(**WHO),
    events.Trained(result=events.TrainResult(loss=0.5, samples=7), train_s=2.0, **WHO),
    events.Published(snapshot="s", bytes=4, basis="0:a:1", **WHO),
    events.PeerLate(peer="c", **WHO),
    events.PhaseStarted(phase="merge", previous="wait", previous_s=0.25, **WHO),
    events.BasisAdopted(peer="b", basis="0:b:1", moved=0.5, groups={"g": 0.5}, **WHO),
    events.PeerRefused(peer="d", reason="nan", **WHO),
    events.Merged(
        contributions=PARTS,
        heard=1,
        expected=3,
        result=events.MergeResult(
            before={"accuracy": 0.25}, after={"accuracy": 0.5}, accepted=0.75, cpu_s={"merge": 0.125}, notes=("n",)
        ),
        push_weight=0.5,
        **WHO,
    ),
)
END = events.RoundFinished(
    heard=1, expected=3, bytes_sent=10, bytes_received=20, loss=0.5, samples=7, basis="0:b:1", contributions=PARTS,
    before={"accuracy": 0.25}, after={"accuracy": 0.5}, accepted=0.75, late={"c": "deadline"}, refused={"d": "nan"},
    seconds={"train": 2.0, "wait": 0.25, "merge": 0.125}, push_weight=0.5, notes=("n",), **WHO,
)  # fmt: skip
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("event", [*ROUND, END], ids=lambda event: type(event).__name__)
def test_an_event_comes_back_from_json(event: events.Event) -> None:
    assert parse_event(json.loads(json.dumps(event.to_dict()))) == event


@given(st.sampled_from(sorted(KINDS)), st.data())
def test_plain_values_of_any_form(kind: str, data: st.DataObject) -> None:
    """Nothing is raised, and the result is an event whose fields have their types: it is JSON, and comes back."""
    keys = [key for key in KINDS[kind].__dataclass_fields__ if key != "result"]
    keys += ["loss", "samples", "before", "notes", "accepted", "merge_s"] if kind in ("Trained", "Merged") else []
    found = parse_event({"event": kind, **{key: data.draw(ODD) for key in keys}})
    assert type(found) is KINDS[kind]
    plain = json.loads(to_json(found.to_dict()))
    assert finite(parse_event(plain).to_dict()) == finite(found.to_dict())  # pyright: ignore[reportOptionalMemberAccess]


def test_the_end_of_a_round_says_all_of_it() -> None:
    """Each field is that of an event of the round; nothing of it is left in the next one."""
    view = AgentView("a")
    for event in ROUND:
        view.take(event)
    assert replace(view.round_finished(2, bytes_sent=10, bytes_received=20), run="r", time_s=5.0) == END
    view.take(replace(ROUND[0], round=3))
    bare = view.round_finished(3, bytes_sent=0, bytes_received=0)
    assert bare == events.RoundFinished(
        agent="a", round=3, heard=0, expected=0, bytes_sent=0, bytes_received=0, basis="0:b:1"
    )


def ends(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Yield of each round's end in an old log, as it is read, the training and the merge that the lines tell."""
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()[1:]]
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for line, event in zip(lines, read_events(folder / "events.jsonl")):
        if "agent" in line:
            newest[line["event"], line["agent"]] = line
        if line["event"] == "RoundFinished":
            yield event, newest["Trained", line["agent"]], newest["Merged", line["agent"]]


@pytest.mark.parametrize("folder", LOGS, ids=lambda folder: folder.name)
def test_rounds_of_an_old_log_are_completed(folder: Path) -> None:
    found = list(ends(folder))
    assert len(found) >= 3
    for event, trained, merged in found:
        if trained["round"] == event["round"]:
            assert (event["loss"], event["samples"]) == (trained["loss"], trained["samples"])
            assert event["seconds"]["train"] == trained["train_s"]
        else:
            assert (event["loss"], event["samples"]) == (None, 0)
        same = ("round", "contributions", "heard", "expected", "before", "after", "accepted", "notes", "push_weight")
        assert {key: event[key] for key in same} == {key: merged[key] for key in same}
        assert event["seconds"]["merge"] == merged["merge_s"]


def test_the_dashboard_of_an_old_run_has_the_figures_of_its_results() -> None:
    results = read_results(OLD / "simulation")
    state = FolderSource(OLD / "simulation").state
    api = StateApi(state)
    curves = api.since(0)["curves"]
    for row in results.rows:
        (point,) = (each for each in curves[row.agent] if each[0] == row.round)
        assert point[1:] == [row.loss, row.before, row.after]
        (merge,) = api.merges(row.agent, row.round)["merges"]  # pyright: ignore[reportGeneralTypeIssues]
        assert (merge["heard"], merge["expected"], merge["after"]) == (row.heard, row.expected, row.after)
    assert sum(agent.sent for agent in state.agents.values()) == sum(row.bytes_sent for row in results.rows)


def test_an_old_log_goes_on(tmp_path: Path) -> None:
    """It keeps its header; what is added is read as it was written, though nothing before it tells of the round."""
    path = tmp_path / "events.jsonl"
    path.write_bytes((LOGS[1] / "events.jsonl").read_bytes())
    log = JsonlListener(path)
    log(replace(END, round=9))
    log.close()
    *_, last = read_events(path)
    assert json.loads(path.read_text().splitlines()[0]) == {**HEADER, "format": 1}
    assert parse_event(last) == replace(END, round=9)
