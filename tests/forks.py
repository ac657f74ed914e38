"""Starts Python in processes forked from a server that has torch and dimat loaded (`tests.fork_server`), which saves
some three CPU-seconds a process. They are real processes: they have a number, take signals, and end with a code.

Run as a program, `python -I -S tests/forks.py SOCKET WORDS…`, this file stands in for `python WORDS…`: it hands on its
files, folder and environment, passes signals on, and ends as the forked process does. `program` writes such a program
for tests that start commands in a shell or by `subprocess`. Only Linux forks here; elsewhere processes start as ever.
Tests of starting itself use `sys.executable`.
"""

from __future__ import annotations

import array
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
FORKS = sys.platform == "linux"
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
LARGEST_BYTES = 200_000  # of a request; a packet on a Unix socket holds a little more


class Process:
    """A forked process, with what tests use of `subprocess.Popen`.

    `session`: it leads a session and a process group of its own; else it is in the server's, which is that of the
    tests. `umask`: -1 for the server's. It is killed when whoever started it ends or forgets it.
    """

    def __init__(
        self,
        server: str,
        words: Sequence[str],
        *,
        cwd: Path | str,
        env: Mapping[str, str],
        files: Iterable[int],
        session: bool = False,
        umask: int = -1,
    ) -> None:
        self.returncode: int | None = None
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.connect(server)
        ignored = [number for number in PASSED_ON if signal.getsignal(number) is signal.SIG_IGN]
        request = {"words": list(words), "cwd": str(cwd), "env": dict(env), "ignored": ignored, "session": session}
        request["umask"] = umask
        fds = array.array("i", files)
        self._server.sendmsg([json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        self.pid = int(self._server.recv(64) or 0)
        if not self.pid:
            raise RuntimeError("the fork server has ended: see what it has said on stderr")
        try:
            self._pidfd = os.pidfd_open(self.pid)  # a number may be another's by the time that a signal is sent
        except ProcessLookupError:
            self._pidfd = -1

    def poll(self) -> int | None:
        """Return the exit code, negative where a signal has ended it, or None while it runs."""
        if self.returncode is None and select.select([self._server], [], [], 0)[0]:
            self.returncode = int(self._server.recv(64) or -signal.SIGKILL)  # without a word, the server was killed
            self._server.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it ends, for at most `timeout` seconds; return the exit code as `poll` does."""
        if self.poll() is None:
            select.select([self._server], [], [], timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None and self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                return

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __del__(self) -> None:
        self._server.close()
        if getattr(self, "_pidfd", -1) >= 0:
            os.close(self._pidfd)


def start(
    words: Sequence[str],
    *,
    env: Mapping[str, str],
    stderr: int,
    stdout: int | None = None,
    cwd: Path | str = ROOT,
    loads: Sequence[str] = (),
) -> Process | subprocess.Popen[bytes]:
    """Start `python WORDS…`, forked where that can be, without input. `words`: `-m MODULE …`, `-c CODE …` or `FILE …`;
    `stdout`: None drops it; `loads`: what the server loads besides torch and dimat."""
    with open(os.devnull, "r+b") as nothing:
        files = (nothing.fileno(), nothing.fileno() if stdout is None else stdout, stderr)
        if FORKS:
            return Process(server(*loads), words, cwd=cwd, env=env, files=files)
        command = [sys.executable, *words]
        return subprocess.Popen(command, cwd=cwd, env=env, stdin=files[0], stdout=files[1], stderr=files[2])


@cache
def server(*modules: str) -> str:
    """Start a fork server, once a test process; return the path of its socket. `modules`: what it loads besides torch
    and dimat. It ends with this process."""
    path = os.path.join(_folder(), "socket")
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    _servers.append(
        subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", path, *modules],
            cwd=ROOT,
            env={**os.environ, **one, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,  # its end is the server's
            stdout=subprocess.DEVNULL,
        )
    )
    ends = time.monotonic() + 60
    while not os.path.exists(path):
        if _servers[-1].poll() is not None or time.monotonic() > ends:
            raise RuntimeError("the fork server does not start")
        time.sleep(0.01)
    return path


_servers: list[subprocess.Popen[bytes]] = []
_folders: list[tempfile.TemporaryDirectory[str]] = []


def end_servers() -> None:
    """End the servers of this test process, and whatever they have forked."""
    for each in _servers:
        assert each.stdin is not None
        each.stdin.close()
        each.wait()


def program(file: Path, *words: str, env: Mapping[str, str] | None = None, loads: Sequence[str] = ()) -> Path:
    """Write a program that stands in for `python WORDS… …`; return its path. `env`: what it adds to the environment;
    `loads`: see `start`."""
    python = [sys.executable, "-I", "-S", __file__, server(*loads)] if FORKS else [sys.executable]
    file.parent.mkdir(parents=True, exist_ok=True)
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in (env or {}).items())
    file.write_text(f'#!/bin/sh\n{exports}exec {shlex.join([*python, *words])} "$@"\n')
    file.chmod(0o755)
    return file


@cache
def dimat(*loads: str) -> str:
    """Return a program that stands in for `python -m dimat.cli`; `loads`: see `start`."""
    return str(program(Path(_folder()) / "dimat", "-m", "dimat.cli", loads=loads))


@cache
def python() -> str:
    """Return a program that stands in for Python with `-m`, `-c` or a file."""
    return str(program(Path(_folder()) / "python"))


def _folder() -> str:
    _folders.append(tempfile.TemporaryDirectory(prefix="dimat-forks-"))
    return _folders[-1].name


def _stand_in(path: str, *words: str) -> None:
    """Fork a process, and end as it does."""
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    process = Process(path, words, cwd=os.getcwd(), env=os.environ, files=(0, 1, 2), session=True, umask=os.umask(0))
    for number in PASSED_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: process.send_signal(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    code = process.wait()
    if code < 0:
        _die(-code)
    sys.exit(code)


def _die(number: int) -> None:
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    _stand_in(*sys.argv[1:])
