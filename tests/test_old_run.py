"""Runs of an earlier version are read, judged and gone on with.

Reference: tests/golden/old-run, written by dimat at commit 63d4f03 (event logs of format 1): three agents'
folders after round 3, a simulation with a crash, and in expected.json what that version said of them, and how its
rounds 4 and 5 went.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dimat.agent.learner.checkpoint_store import look
from dimat.cli import main
from dimat.config import load_experiment
from dimat.simulate import run_simulation
from dimat.simulate.replay import replay_run
from dimat.ui.jsonl_read import read_events
from dimat.weights.snapshot import checksum
from tests.agent.processes import Network

OLD = Path(__file__).parent / "golden" / "old-run"
EXPECTED = json.loads((OLD / "expected.json").read_text())
LABS = ("lab-a", "lab-b", "lab-c")
DEFAULTS = ("train.initialisation=own", "train.loss=task", "train.optimizer_state=kept")
"""Of then, where they have changed."""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Return a copy of the runs that may be written to."""
    shutil.copytree(OLD, tmp_path / "old")
    return tmp_path / "old"


def near(found: Any, expected: Any) -> None:
    """Check equal trees; numbers may differ by rounding."""
    if isinstance(expected, dict):
        assert found.keys() >= expected.keys()
        for key, value in expected.items():
            near(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            near(one, other)
    else:
        assert found == (pytest.approx(expected, rel=1e-9) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("log", ["simulation", *(f"agents/old-run/{name}" for name in LABS)])
def test_event_logs_are_read(log: str) -> None:
    """All that an old log says is handed out: what a round's end did not say in it, too."""
    path = OLD / log / "events.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["format"] == 1
    found = list(read_events(path))
    assert Counter(event["event"] for event in found) == Counter(event["event"] for event in lines[1:])
    for event, line in zip(found, lines[1:]):
        near(event, line)


def test_an_agent_is_reported(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ledger and manifests give the same lineage, as JSON and in words."""
    folder = old / "agents" / "old-run" / "lab-a"
    assert main(["report", str(folder), "--json"]) == 0
    near(json.loads(capsys.readouterr().out), EXPECTED["report"])
    assert main(["report", str(folder)]) == 0
    verdict, _, text = capsys.readouterr().out.partition("\n\n")
    assert verdict.startswith("whether merging beat training alone was not measured; 3 merges changed")  # said since
    assert text == EXPECTED["text"]


def set_timers_after_training(trace: Path) -> None:
    """Move a trace's timers to where they are set since deadlines are counted from the end of training."""
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    for line in lines:
        kinds = [action["kind"] for action in line.get("actions", ())]
        if "Train" in kinds:
            line["actions"] = [action for action in line["actions"] if action["kind"] != "SetTimer"]
        elif "Publish" in kinds and line["event"]["kind"] == "TrainingDone":
            timer = {"kind": "SetTimer", "round": line["event"]["round"], "seconds": 600.0}
            line["actions"].insert(kinds.index("Publish"), timer)
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_simulation_is_reported_and_replayed(old: Path) -> None:
    """Its page is written anew, and this version's round machines ask for the same as those of then."""
    set_timers_after_training(old / "simulation" / "trace.jsonl")
    assert main(["report", str(old / "simulation")]) == 0
    assert "old-simulation" in (old / "simulation" / "report.html").read_text()
    replayed = replay_run(old / "simulation")
    assert (replayed.steps, replayed.actions, replayed.difference) == (72, 118, "")


def test_the_same_experiment_has_the_same_results(old: Path) -> None:
    """Who heard whom, bytes, bases and samples are equal; losses and accuracies up to another processor's rounding."""
    expected = json.loads((OLD / "simulation" / "results.json").read_text())
    results = run_simulation(load_experiment(old / "experiment.toml", DEFAULTS)).model_dump(mode="json")
    assert len(results["rows"]) == len(expected["rows"])
    for row, then in zip(results["rows"], expected["rows"]):
        for key, value in then.items():
            inexact = key in ("loss", "before", "after", "consensus_distance")
            assert row[key] == (pytest.approx(value, abs=0.03) if inexact else value), key


def test_checkpoints_and_snapshots_are_read(old: Path) -> None:
    """The newest checkpoint fits the model, and each snapshot is whole under its address."""
    for name in LABS:
        folder = old / "agents" / "old-run" / name
        assert [fault for _, fault in look(folder / "checkpoints")] == [""]
        (snapshot,) = (folder / "snapshots").glob("*.safetensors")
        assert checksum(snapshot.read_bytes()).root == snapshot.stem


def test_agents_go_on(old: Path, tmp_path: Path) -> None:
    """Three agents take up their folders of then, merge rounds 4 and 5 with each other, and come out where the version
    of then did."""
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in LABS]
        ports = {name: each.getsockname()[1] for name, each in zip(LABS, taken)}
    text = (old / "map.toml").read_text()
    ports_in_order = iter(ports.values())
    (old / "map.toml").write_text(re.sub(r"127\.0\.0\.1:\d+", lambda _: f"127.0.0.1:{next(ports_in_order)}", text))
    net = Network(old, LABS, ports)
    for name in LABS:
        shutil.move(old / "agents" / "old-run" / name, old / name)
    try:
        for name in LABS:
            net.start(name, "schedule.rounds=5", "agent.evaluate=all", *DEFAULTS)
        assert [life.wait() for life in net.lives] == [0, 0, 0]
    finally:
        net.end()
    for name in LABS:
        assert [event["round"] for event in net.events(name, "Resumed")] == [3]
        merges = [event for event in net.events(name, "Merged") if event["round"] > 3]
        assert [event["round"] for event in merges] == [4, 5]
        assert all({part["agent"] for part in event["contributions"]} == set(LABS) for event in merges)
        for event, then in zip(merges, EXPECTED["continued"][name]):
            for when in ("before", "after"):
                assert event[when] == pytest.approx(then[when], abs=0.03)
