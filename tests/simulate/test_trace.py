"""Traces: what a run's machines were told and asked for, replayed on fresh machines (reference: the run itself)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dimat.agent.protocol import mixing_state
from dimat.agent.protocol.round import RoundMachine
from dimat.cli import main
from dimat.errors import DataError
from dimat.simulate import run_simulation
from dimat.simulate.replay import replay_run
from tests.simulate.helpers import tiny_experiment

FAULTS = [
    {"kind": "crash", "agent": "agent-1", "round": 2, "on": "merge", "restart_after_s": 0.5},
    {"kind": "join", "agent": "agent-2", "at_s": 1.5},
]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run with a crash, a late joiner and slow links, and its trace."""
    folder = tmp_path_factory.mktemp("traced")
    network = {"latency_s": [0.01, 0.1], "loss": 0.1}
    config = tiny_experiment(folder, simulate__faults=FAULTS, simulate__network=network, simulate__trace=True)
    run_simulation(config, out=folder / "run")
    return folder / "run"


def test_a_trace_replays(traced: Path) -> None:
    """Machines draw nothing and read no clock: the same events give the same actions, over crashes and joins too."""
    found = replay_run(traced)
    lines = [json.loads(line) for line in (traced / "trace.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "event" in line]
    assert found.difference == ""
    assert (found.steps, found.actions) == (len(steps), sum(len(line["actions"]) for line in steps))
    assert sum("begin" in line for line in lines) == 4, "three agents, one of them twice"
    assert {line["event"]["kind"] for line in steps} >= {"Started", "TrainingDone", "PeerPublished", "MergeDone"}


def test_a_replay_names_the_first_difference(traced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other code: machines that give peers another weight are found out at the first merge, by line, agent and key."""
    monkeypatch.setattr(mixing_state, "shares", lambda *given: (1.0, dict.fromkeys(given[-1], 0.0)))
    found = replay_run(traced)
    assert "actions[0].own_weight was 0." in found.difference
    assert found.difference.startswith("line ")
    assert "is 1.0" in found.difference


def test_a_machine_that_fails_is_a_difference(traced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception is reported like any other difference."""
    monkeypatch.setattr(RoundMachine, "_merged", lambda self, event: 1 / 0)
    assert "told MergeDone: raises ZeroDivisionError" in replay_run(traced).difference


def test_a_line_that_was_cut_short_is_passed_over(traced: Path, tmp_path: Path) -> None:
    """What kill -9 leaves: the last line without its end. Damage before it is an error that names the line."""
    for file in ("experiment.json", "origin.json"):
        (tmp_path / file).write_bytes((traced / file).read_bytes())
    text = (traced / "trace.jsonl").read_text()
    (tmp_path / "trace.jsonl").write_text(text[:-20])
    assert replay_run(tmp_path).steps == replay_run(traced).steps - 1
    lines = text.splitlines(keepends=True)
    (tmp_path / "trace.jsonl").write_text("".join([*lines[:5], '{"agent": 3}\n', *lines[5:]]))
    with pytest.raises(DataError, match="line 6: no step of a trace"):
        replay_run(tmp_path)


def test_the_command(traced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`simulate --replay`: 0 and a count; 5 where there is no trace; 2 with an experiment beside it."""
    assert main(["simulate", "--replay", str(traced)]) == 0
    assert "all the same" in capsys.readouterr().out
    assert main(["simulate", "--replay", str(traced), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["difference"] == ""
    assert main(["simulate", "--replay", str(tmp_path)]) == 5
    assert "is no run folder of dimat" in capsys.readouterr().err
    assert main(["simulate", "x.toml", "--replay", str(traced)]) == 2
    assert "leave out FILE" in capsys.readouterr().err
