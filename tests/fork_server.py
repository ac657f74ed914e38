"""The server that `tests.forks` asks for processes: `python -m tests.fork_server SOCKET [MODULE…]`.

It loads torch and dimat and waits; for each request it forks, and the child becomes what `python WORDS…` would have
been in the given folder, with the given environment and files. It has one thread and knows no gRPC, whose threads do
not survive a fork. It ends when its stdin does, and its children with it.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.forks import LARGEST_BYTES, PASSED_ON

LOADED = (
    "torch",
    "torch.export._trace",
    "sympy.tensor.tensor",
    "scipy.optimize",
    "numpy",
    "dimat.agent.setup.followed_map",
    "dimat.agent.setup.prepare",
    "dimat.cli",
    "dimat.merge.api",
    "dimat.net.discovery.map_records",
    "dimat.net.pki.keyring",
    "dimat.simulate",
    "dimat.ui.jsonl",
    "dimat.ui.listeners",
    "dimat.ui.terminal.panel",
    "dimat.wire.v1.peer_pb2",
)
_PR_SET_PDEATHSIG = 1
_code: list[int] = []
"""The code that a child ends with, once it is known."""


@dataclass
class Job:
    """What a child is to become: `words` are `-m MODULE …`, `-c CODE …` or `FILE …`, as Python takes them."""

    words: list[str]
    cwd: str
    env: dict[str, str]
    ignored: list[int]
    session: bool
    umask: int
    files: list[int]


class Server:
    """Forks children, and says how they end to whoever has asked for them."""

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"{path}.bound")
        self._listener.listen(64)
        os.rename(f"{path}.bound", path)  # whoever finds it can connect: between bind and listen nobody could
        self._woken, wake = socket.socketpair()
        wake.setblocking(False)
        self._wake = wake
        self._children: dict[int, tuple[socket.socket, bool]] = {}
        self._selector = selectors.DefaultSelector()

    def serve(self) -> Job | None:
        """Serve until stdin ends, and return None; in a child, return what this is to become."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tests are told, and say what is to end
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake.fileno())
        for each in (self._listener, self._woken, sys.stdin):
            self._selector.register(each, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is sys.stdin:
                    return None
                if key.fileobj is self._woken:
                    self._woken.recv(4096)
                    self._reap()
                elif key.fileobj is self._listener:
                    job = self._fork(self._listener.accept()[0])
                    if job is not None:
                        return job
                else:
                    self._kill(key.fileobj)

    def _fork(self, client: socket.socket) -> Job | None:
        packet, ancillary, _, _ = client.recvmsg(LARGEST_BYTES, socket.CMSG_SPACE(12))
        files = array.array("i")
        for _, _, data in ancillary:
            files.frombytes(data)
        if not packet:  # it was killed before it could ask
            client.close()
            return None
        job = Job(**json.loads(packet), files=list(files))
        assert len(os.listdir("/proc/self/task")) == 1, "a library has started a thread, which would not survive a fork"
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_child(server, client)
            return job
        for file in files:
            os.close(file)
        self._children[pid] = (client, job.session)
        self._selector.register(client, selectors.EVENT_READ)
        with suppress(OSError):  # it was killed: its end comes next, and is the child's
            client.send(str(pid).encode())
        return None

    def _become_child(self, server: int, client: socket.socket) -> None:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:  # it had died before the kernel was told
            os._exit(1)
        for each in (self._selector, self._listener, self._woken, self._wake, client):
            each.close()
        for each, _ in self._children.values():
            each.close()

    def _reap(self) -> None:
        for pid in list(self._children):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                client, _ = self._children.pop(pid)
                with suppress(OSError):  # nobody waits for it
                    client.send(str(os.waitstatus_to_exitcode(status)).encode())
                self._forget(client)
                client.close()

    def _kill(self, client: Any) -> None:
        """Kill the child of a client that is gone: none says anything once it has asked."""
        self._forget(client)
        for pid, (whose, session) in self._children.items():
            if whose is client:
                with suppress(ProcessLookupError):  # it is about to lead a group
                    if session:
                        os.killpg(pid, signal.SIGKILL)
                os.kill(pid, signal.SIGKILL)

    def _forget(self, client: Any) -> None:
        with suppress(KeyError, ValueError):  # it has been forgotten before
            self._selector.unregister(client)


def become(job: Job, loaded: dict[str, str], path: list[str]) -> None:
    """Become what `python WORDS…` would be. `loaded`: what loading modules has put into the environment; `path`:
    where modules are found, but for the folder and PYTHONPATH."""
    if job.session:
        os.setsid()
    if job.umask >= 0:
        os.umask(job.umask)
    os.chdir(job.cwd)
    os.environ.clear()
    os.environ.update({**loaded, **job.env})
    for number in PASSED_ON:
        signal.signal(number, signal.SIG_IGN if number in job.ignored else signal.SIG_DFL)
    if signal.SIGINT not in job.ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(job.files):
        os.dup2(file, number)
        os.close(file)
    _open_streams()
    sys.path[:] = [*filter(None, job.env.get("PYTHONPATH", "").split(os.pathsep)), *path]
    importlib.invalidate_caches()
    import numpy as np
    import torch

    np.random.seed()  # else all that are forked would draw the same
    torch.default_generator.seed()
    try:
        _run(job.words)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            _code.append(end.code or 0)
        raise
    _code.append(0)


def end_at_once() -> None:
    """End without taking torch to pieces, which takes a quarter of a second: threads have been joined, and functions
    registered for the end have run."""
    if not _code:
        return
    code = _code[0]
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            code = 120  # as Python does
    os._exit(code & 0xFF)


def _run(words: list[str]) -> None:
    kind, *rest = words
    if kind == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path.insert(0, "")
        sys.argv = [kind, *rest[1:]]
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
        runpy.run_path(kind, run_name="__main__")


def _open_streams() -> None:
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    encoding = encoding or "utf-8"
    sys.stdin = sys.__stdin__ = open(0, encoding=encoding, closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", encoding=encoding, errors=errors or "strict", closefd=False)
    sys.stdout.reconfigure(write_through=bool(os.environ.get("PYTHONUNBUFFERED")))
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, encoding=encoding, errors="backslashreplace", closefd=False)


def main(path: str, *modules: str) -> None:
    atexit.register(end_at_once)  # the first to be registered is the last to run
    server = Server(path)
    before = dict(os.environ)
    for name in (*LOADED, *modules):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    assert not {"grpc", "hivemind"} & sys.modules.keys(), "gRPC must be loaded after the fork"
    loaded = {name: value for name, value in os.environ.items() if name not in before}
    root = str(Path(__file__).parent.parent)
    search = [each for each in sys.path if each not in ("", root)]
    gc.collect()
    gc.freeze()  # collections in children need not touch what all share
    job = server.serve()
    if job is not None:
        become(job, loaded, search)


if __name__ == "__main__":
    main(*sys.argv[1:])
