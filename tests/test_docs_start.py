"""docs/index.md, "Start in five minutes": its commands in a bare clone, as a person types them at a terminal; then a
second terminal, Ctrl-C, and the return. The environment is made beforehand (the page's first command finds nothing to
do), and the agents' ports are exchanged, since other tests start networks on this host."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pages import ROOT, blocks
from tests.test_readme import other_ports

pytestmark = pytest.mark.page

PATIENCE_S = 240.0
START, LOOK, AGAIN = [block.text.splitlines() for block in blocks(ROOT / "docs" / "index.md") if block.runs]


class Terminal:
    """An interactive shell on a terminal of its own, in a folder."""

    def __init__(self, folder: Path) -> None:
        ours, theirs = os.openpty()
        self._terminal = ours
        env = {name: value for name, value in os.environ.items() if not name.startswith(("DIMAT_", "PYTHON"))}
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "bash", "--norc", "--noprofile", "-i"],
            cwd=folder,
            env={**env, "OMP_NUM_THREADS": "1", "PS1": "ready> ", "TERM": "dumb", "HISTFILE": ""},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        self._said = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        try:
            while data := os.read(self._terminal, 4096):
                self._said += data
        except OSError:  # the shell has ended
            return

    @property
    def said(self) -> str:
        return self._said.decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def does(self, line: str) -> str:
        """Type a command, wait until it has ended with 0, and return what it said."""
        before = len(self.said)
        self.type(f"{line}; echo code=$?\n")
        self.until(lambda: re.search(r"^code=\d+\r?$", self.said[before:], re.MULTILINE), line)
        said = self.said[before:]
        assert re.findall(r"^code=(\d+)\r?$", said, re.MULTILINE) == ["0"], said
        return said

    def until(self, true: Callable[[], Any], what: str) -> Any:
        ends = time.monotonic() + PATIENCE_S
        while not (value := true()):
            assert time.monotonic() < ends, f"it never came: {what}\n{self.said}"
            time.sleep(0.1)
        return value

    def close(self) -> None:
        """Hang up: the shell ends its jobs."""
        self.type("\x03\nkill -9 $(jobs -p) 2>/dev/null; exit\n")
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join(30)
            os.close(self._terminal)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone as if the working tree were committed, with an environment that has what pip would install."""
    folder = tmp_path / "dimat"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    (site,) = (folder / ".venv" / "lib").glob("python*/site-packages")
    # the clone comes first, so that the package is its own
    (site / "all.pth").write_text(f"{folder}\n{sysconfig.get_path('purelib')}\n")
    program = folder / ".venv" / "bin" / "dimat"
    program.write_text('#!/bin/sh\nexec "$(dirname "$0")/python" -m dimat.cli "$@"\n')
    program.chmod(0o755)
    for mark in (".run", ".dev"):
        (folder / ".venv" / mark).touch()
    return folder


def events(clone: Path, name: str, kind: str) -> list[dict[str, Any]]:
    file = clone / "agents" / "trio" / name / "events.jsonl"
    if not file.exists():
        return []
    found = [json.loads(line) for line in file.read_bytes().split(b"\n")[1:-1]]
    return [event for event in found if event["event"] == kind]


@pytest.mark.skipif(shutil.which("setsid") is None, reason="needs util-linux's setsid")
def test_five_minutes(clone: Path) -> None:
    """At most six commands to a running network; it learns and merges, says how it is, stops on Ctrl-C, and goes on."""
    assert len(START) <= 6
    first, second = Terminal(clone), None
    try:
        *background, last = START
        for line in background:
            if line.endswith("&"):
                first.type(f"{line}\n")
            else:
                first.does(line)
            if line.startswith("dimat init"):
                for name in ("map.toml", "agents.toml", "keys/ca.crt", "keys/lab-c.key"):
                    assert (clone / "trio" / name).exists()
                other_ports(clone / "trio" / "map.toml")
        first.does(f'test "$(command -v dimat)" = "{clone}/.venv/bin/dimat"')
        first.type(f"{last}\n")
        both = {"lab-a", "lab-b", "lab-c"}
        first.until(
            lambda: all(
                any({part["agent"] for part in e["contributions"]} == both for e in events(clone, name, "Merged"))
                for name in both
            ),
            "a merge of all three at each",
        )
        first.until(lambda: re.search(r"round \d+: loss .*heard 2/2, accuracy 0\.\d+", first.said), "a line per round")

        second = Terminal(clone)
        said = "".join(second.does(line) for line in LOOK)
        assert re.search(r"lab-a of run trio: round \d+ of 500", said)
        assert said.count("connected") >= 2
        assert re.search(r"lab-c +1-\d+", said)

        first.type("\x03")
        first.until(lambda: events(clone, "lab-c", "AgentLeft"), "lab-c's farewell")
        first.does("test $? -eq 130")
        whole = [e for e in events(clone, "lab-c", "Checkpointed") if e["stage"] != "training"]
        before = whole[-1]["round"]  # one in the middle of a round is beside it, and names the round to come
        seen = len(events(clone, "lab-a", "RoundFinished"))
        first.until(lambda: len(events(clone, "lab-a", "RoundFinished")) >= seen + 2, "lab-a goes on")

        (line,) = AGAIN
        first.type(f"{line}\n")
        started = first.until(lambda: events(clone, "lab-c", "AgentStarted")[1:], "lab-c's return")
        assert started[0]["round"] >= before
        first.until(
            lambda: (
                events(clone, "lab-c", "Merged")[-1]["round"] > before + 1
                and len(events(clone, "lab-c", "Merged")[-1]["contributions"]) == 3
            ),
            "a merge after its return",
        )
        first.type("\x03")
        first.until(lambda: len(events(clone, "lab-c", "AgentLeft")) == 2, "lab-c's second farewell")
        first.does("kill %1 %2; wait")
        for name in ("lab-a", "lab-b"):
            assert events(clone, name, "AgentLeft")[-1]["reason"] == "stopped"
        assert (clone / "agents" / "trio" / "lab-c" / "weights.safetensors").exists()
    finally:
        for terminal in (first, second):
            if terminal is not None:
                terminal.close()
