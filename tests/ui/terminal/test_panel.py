"""An agent on a terminal. Reference: what a real pseudo-terminal is sent, read as a terminal reads it; the events."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from dimat import events
from dimat.cli.agent import SAME_S
from dimat.events.view import AgentView
from dimat.ui.terminal.agent import AgentListener
from dimat.ui.terminal.panel import LiveAgentListener, agent_listener, panel_lines
from tests.agent.processes import ROOT, network
from tests.forks import start
from tests.ui.terminal.test_watch import CURSOR, read, screen, terminal

__all__ = ["terminal"]  # the fixture
WIDTH = 100


@pytest.fixture
def wide(terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """A pseudo-terminal with room for the panel."""
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("LINES", "40")
    return terminal


def story() -> list[events.Event]:
    """Return the events of a round in which one peer is late and one warned of."""
    who = {"run": "tiny", "agent": "lab-a"}
    view = AgentView()
    told = [
        events.AgentStarted(
            **who, round=2, address="127.0.0.1:1", peers=("lab-b", "lab-c"), samples=10, parameters=5, secure=True,
            rounds=9,
        ),
        events.RoundStarted(**who, round=3),
        events.PhaseStarted(**who, round=3, phase="train"),
        events.Trained(**who, round=3, result=events.TrainResult(loss=0.4123, samples=10), train_s=1.0),
        events.PhaseStarted(**who, round=3, phase="wait", previous="train", previous_s=12.0),
        events.PeerLate(**who, round=3, peer="lab-\x1b[31mc"),
        events.PhaseStarted(**who, round=3, phase="merge", previous="wait", previous_s=3.0),
        events.Warned(run="tiny", message="the disk is nearly full\x1b[2J", agent="lab-a"),
        events.Merged(
            **who, round=3, contributions=(), heard=1, expected=2, result=events.MergeResult(
                before={"accuracy": 0.5}, after={"accuracy": 0.75}
            ),
        ),
        events.NetworkObserved(
            **who, round=3, connected=("lab-b",), sent={"lab-b": {"fp32": 1500}},
            received={"lab-b": {"int8": 2_000_000}},
        ),
    ]  # fmt: skip
    for event in told:
        view.take(event)
    return [*told, replace(view.round_finished(3, bytes_sent=1500, bytes_received=2_000_000), run="tiny")]


def test_what_the_panel_says() -> None:
    """Each number is that of an event; the phase's seconds go on."""
    view = AgentView()
    for event in story():
        view.take(event, 100.0)
    assert dict(panel_lines(view, 104.0)) == {
        "round": "3 of 9, merge for 4.0 s",
        "model": "loss 0.412, accuracy 0.500 → 0.750",
        "peers": "1 of 2 connected, heard 1 of 2, late: lab-\x1b[31mc",
        "bytes": "1.5 kB out, 2.0 MB in",
        "time": "train 12.0 s, wait 3.0 s, merge 4.0 s",
        "warning": "the disk is nearly full\x1b[2J",
    }
    view.take(events.AgentLeft(run="tiny", agent="lab-a", round=3, reason="done"), 105.0)
    assert dict(panel_lines(view, 200.0))["round"].startswith("3 of 9, has left (done)")


def test_a_terminal_has_lines_above_the_panel(wide: tuple[int, int]) -> None:
    """One panel is left, in which nothing of a peer moves the cursor; the lines stand above it, each once."""
    person, program = wide
    # a terminal takes some thousand bytes before somebody reads them
    with open(program, "w", encoding="utf-8", closefd=False) as stream, ThreadPoolExecutor(1) as reader:
        reading = reader.submit(read, person, CURSOR)
        listener = agent_listener("accuracy", stream, 0, plain=False)
        assert isinstance(listener, LiveAgentListener)
        for event in story():
            listener(event)
        listener.close()
        listener.close()
        sent = reading.result()
    assert "\x1b[2J" not in sent
    shown = [line for line in screen(sent) if line]
    top = next(number for number, line in enumerate(shown) if line.startswith("╭"))
    assert "lab-a of run tiny" in shown[top]
    assert [line for line in shown if line.startswith("╭")] == [shown[top]]
    above = "\n".join(shown[:top])
    assert above.count("round 3: loss 0.412, heard 1/2, accuracy 0.500 -> 0.750, sent 1.5 kB") == 1
    assert above.count("warning: agent lab-a: the disk is nearly full") == 1
    panel = "\n".join(shown[top:])
    assert "3 of 9, merge for" in panel
    assert "heard 1 of 2, late: lab-\\x1b[31mc" in panel


def test_the_panel_goes_on_by_itself(wide: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing happens its seconds are drawn anew; a terminal that goes away ends it, and nothing is raised."""
    monkeypatch.setattr("dimat.ui.terminal.panel.TICK_S", 0.01)
    person, program = wide
    with open(program, "w", encoding="utf-8", closefd=False) as stream:
        listener = agent_listener("accuracy", stream, 0, plain=False)
        for event in story()[:3]:
            listener(event)
        read(person, until="train for 0.3 s")
        with ThreadPoolExecutor(1) as reader:
            reading = reader.submit(read, person, CURSOR)
            listener.close()
            reading.result()
    panels = [thread for thread in threading.enumerate() if thread.name == "panel"]
    for thread in panels:  # it is told to end, and not waited for
        thread.join(60)
    assert not [thread for thread in panels if thread.is_alive()]


@pytest.mark.parametrize("how", ["pipe", "dumb", "plain", "quiet"])
def test_plain_lines_elsewhere(wide: tuple[int, int], monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """No terminal, a dumb one, --plain and -q: lines as ever."""
    if how == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    with open(wide[1], "w", encoding="utf-8", closefd=False) as stream:
        to = io.StringIO() if how == "pipe" else stream
        assert type(agent_listener("accuracy", to, -(how == "quiet"), how == "plain")) is AgentListener


@pytest.mark.live
def test_ctrl_c_gives_the_terminal_back(tmp_path: Path, wide: tuple[int, int]) -> None:
    """`dimat agent` on a terminal: the panel shows rounds; Ctrl-C twice in a row, the second while it leaves, ends it
    with 130, and the cursor is back."""
    person, program = wide
    lingering = "rounds = 0\nround_deadline_s = 5\njoin_wait_s = 1"
    with network(tmp_path, ("lab-a",), (0,), schedule=lingering, train="epochs_per_round = 50\nbatch_size = 8") as net:
        net.write_map(addresses=False)
        command = ["-m", "dimat.cli", "agent", str(tmp_path / "agents.toml"), "--name", "lab-a"]
        command += ["--set", f"agent.folder={tmp_path / 'lab-a'}", "--set", "agent.listen=127.0.0.1:0"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
        process = start(command, env=environment, stderr=program)
        try:
            sent = read(person, until="lab-a of run tiny")
            sent += read(person, until="round 1: ")
            process.send_signal(signal.SIGINT)
            sent += read(person, until="once more to stop at once")
            time.sleep(2 * SAME_S)
            process.send_signal(signal.SIGINT)
            sent += read(person, until=CURSOR)
            assert process.wait(60) == 130
            assert sent.rindex("\x1b[?25l") < sent.rindex(CURSOR)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
