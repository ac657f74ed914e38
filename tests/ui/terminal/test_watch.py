"""Text shown again and again. Reference: what a real pseudo-terminal is sent, read as a terminal reads it."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import re
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import anyio.to_thread
import pytest

from dimat.agent.daemon.status_socket import StatusSocket
from dimat.ui.terminal.watch import LiveText
from tests.agent.processes import PATIENCE_S, ROOT
from tests.forks import dimat
from tests.net.agents import RUN, make, started, update_neighbours

WIDTH, HEIGHT = 40, 12
CURSOR = "\x1b[?25h"  # it is shown again
_PIECES = re.compile(r"\x1b\[(\??)(\d*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n])")


def screen(sent: str) -> list[str]:
    """Return the lines of a terminal that was sent this: text, line ends, cursor up, and lines erased."""
    lines, row, column = [""], 0, 0
    for private, count, command, back, end, char in _PIECES.findall(sent):
        if back:
            column = 0
        elif end:
            row, column = row + 1, 0  # the terminal's driver sends \r\n
            lines += [""] * (row + 1 - len(lines))
        elif char:
            lines[row] = lines[row][:column].ljust(column) + char + lines[row][column + 1 :]
            column += 1
        elif command == "A":
            row -= int(count or 1)
        elif command == "K" and count == "2":
            lines[row] = ""
        else:
            assert private or command == "m", (private, count, command)
    return [line.rstrip() for line in lines]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """A pseudo-terminal: the end that a person sees, and the one that a program writes to."""
    monkeypatch.setenv("TERM", "xterm")
    # the size is that of the program's own stdin, stdout or stderr, or what is set
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("LINES", str(HEIGHT))
    person, program = pty.openpty()
    try:
        yield person, program
    finally:
        os.close(person)
        os.close(program)


def read(person: int, until: str) -> str:
    """Read what a terminal is sent; it comes in pieces."""
    sent = b""
    while until.encode() not in sent:
        ready, _, _ = select.select([person], [], [], PATIENCE_S)
        assert ready, f"{until!r} never came: {sent!r}"
        sent += os.read(person, 65536)
    return sent.decode(errors="replace")


def test_a_terminal_shows_the_newest_alone(terminal: tuple[int, int]) -> None:
    """Longer, shorter and too wide texts, one in the place of the other; the last one stays, and the cursor is back."""
    person, program = terminal
    with open(program, "w", encoding="utf-8", closefd=False) as stream, LiveText(stream) as watch:
        watch.show("first\nof three\nlines")
        watch.show("second → [bold]as it is[/]")
        watch.show("third\n" + "wide " * 20)
    sent = read(person, until=CURSOR)
    shown = [line for line in screen(sent) if line]
    assert shown[0] == "third"
    assert len(shown) == 2
    assert len(shown[1]) <= WIDTH
    assert "second → [bold]as it is[/]" in sent
    assert "\x1b[?25l" in sent


def test_elsewhere_one_stands_below_the_other() -> None:
    """A file or a pipe gets plain text, with an empty line between."""
    stream = io.StringIO()
    with LiveText(stream) as watch:
        watch.show("a\nb")
        watch.show("c")
    assert stream.getvalue() == "a\nb\n\nc\n"


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.anyio
async def test_status_watch_on_a_terminal(tmp_path: Path, terminal: tuple[int, int]) -> None:
    """An agent's socket is asked again and again, what is shown is the newest answer; Ctrl-C ends it with 130."""
    person, program = terminal
    asked = 0

    def status() -> dict[str, object]:
        nonlocal asked
        asked += 1
        return {"agent": "lab-a", "run": "r", "round": asked}

    socket = StatusSocket(tmp_path, status)
    await socket.start()
    process = await watching(str(tmp_path), stdout=program)
    try:
        async with asyncio.timeout(PATIENCE_S):
            sent = await anyio.to_thread.run_sync(read, person, "round 3")
            process.send_signal(signal.SIGINT)
            _, said = await process.communicate()
        assert process.returncode == 130, said
        sent += await anyio.to_thread.run_sync(read, person, CURSOR)
        rounds = [line for line in screen(sent) if "round" in line]
        assert len(rounds) == 1
    finally:
        await ended(process)
        await socket.close()


@pytest.mark.anyio
async def test_an_agent_that_ends_ends_the_watch(tmp_path: Path) -> None:
    """Nobody answers in the folder any more: exit code 5, as for one look."""
    socket = StatusSocket(tmp_path, lambda: {"agent": "lab-a"})
    await socket.start()
    process = await watching(str(tmp_path))
    try:
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            assert b"lab-a" in await process.stdout.readline()
            await socket.close()
            _, said = await process.communicate()
        assert process.returncode == 5
        assert b"no agent answers" in said
    finally:
        await ended(process)


@pytest.mark.anyio
async def test_a_peer_out_of_reach_is_asked_on(tmp_path: Path) -> None:
    """A real peer goes away and comes back on its port: it is said so on stderr, and stdout has JSON alone. One that
    was never there ends the command at once."""
    b = make(tmp_path / "b", "b", status=lambda: {"agent": "b", "life": 1})
    file = tmp_path / "agents.toml"
    process = None
    try:
        async with started(b):
            address = b.address
            update_neighbours([b], {"a": "127.0.0.1:9", "b": address})
            (tmp_path / "map.toml").write_text(
                f'graph = "complete"\n[[agents]]\nname = "a"\n[[agents]]\nname = "b"\naddresses = ["{address}"]\n'
            )
            file.write_text(f'run = "{RUN}"\n[topology]\nmap = "map.toml"\n[agent]\ninsecure = true\n')
            process = await watching(str(file), "--name", "a", "--peer", "b", "--json")
            assert process.stdout is not None
            assert process.stderr is not None
            async with asyncio.timeout(PATIENCE_S):
                assert b'"life": 1' in await process.stdout.readline()
        async with asyncio.timeout(PATIENCE_S):
            assert b"not reached now: b at" in await process.stderr.readline()
        again = make(tmp_path / "again", "b", listen=address, status=lambda: {"agent": "b", "life": 2})
        async with started(again):
            update_neighbours([again], {"a": "127.0.0.1:9", "b": address})
            async with asyncio.timeout(PATIENCE_S):
                while b'"life": 2' not in (line := await process.stdout.readline()):
                    assert b'"life": 1' in line
        never = await watching(str(file), "--name", "a", "--peer", "b")
        async with asyncio.timeout(PATIENCE_S):
            assert (await never.communicate())[0] == b""
        assert never.returncode == 3
    finally:
        if process is not None:
            await ended(process)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


async def watching(*words: str, stdout: int = asyncio.subprocess.PIPE) -> asyncio.subprocess.Process:
    """Start `dimat status --watch`."""
    return await asyncio.create_subprocess_exec(
        dimat(), "status", *words, "--watch", cwd=ROOT, env=environment(), stdout=stdout, stderr=asyncio.subprocess.PIPE
    )


async def ended(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.communicate()
