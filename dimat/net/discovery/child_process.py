"""A child process that answers requests, ends with its owner, and is found after a crash.

`ChildProcess` talks to it in JSON lines over stdin and stdout. `PidFile` keeps its token in a file. The token is also
in the environment of the child and of the processes that it starts, so that the orphans of a killed owner can be found
and ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import psutil

from dimat.errors import NetworkError
from dimat.net.limits import DHT_GONE_S, MAX_LINE_BYTES, MAX_LOG_BYTES, MAX_WAITING_REQUESTS

TOKEN_VARIABLE = "DIMAT_HELPER"
"""Environment variable that holds the token."""


class RequestError(NetworkError):
    """A request that the child cannot carry out; `kind`: the child's name for the case."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class ChildProcess:
    """A Python module run in a process group of its own; started when the object is made.

    `module` is run with this process's id as its argument. The request `first` is written at once, and `attach`, to be
    called before `ask`, returns its reply. `kill` ends the child. `gone` is set once it has ended.
    """

    def __init__(self, module: str, *, environment: Mapping[str, str], log: Path, first: Mapping[str, Any]) -> None:
        self.gone = asyncio.Event()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self._transports: list[asyncio.BaseTransport] = []
        self._reading: asyncio.Task[None] | None = None
        self._writer: asyncio.WriteTransport | None = None
        with _open_log(log) as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(environment),
                bufsize=0,
                start_new_session=True,  # Ctrl-C is not for it, and the processes that it starts can be ended with it
            )
        line = _encode({**first, "id": 0})
        with suppress(BrokenPipeError):  # it has ended already, which is noticed when it is waited for
            cast("IO[bytes]", self._process.stdin).write(line)

    async def attach(self, limit_s: float) -> dict[str, Any]:
        """Begin to read, and return the reply to the first request. Raises the errors of `ask`."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=MAX_LINE_BYTES)
        reading, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout)
        self._transports.append(reading)
        self._writer, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, self._process.stdin)
        self._transports.append(self._writer)
        answer = self._waiting[0] = loop.create_future()
        # a plain task: a group's end would raise its fault in `kill`, which has to go on
        self._reading = asyncio.create_task(self._read(reader), name="child's replies")
        return await self._answer(0, "start", answer, limit_s)

    async def ask(self, op: str, limit_s: float, **values: Any) -> dict[str, Any]:
        """Return the reply to a request.

        Raises RequestError if the child cannot carry it out, NetworkError if it does not answer within `limit_s` or has
        ended.
        """
        if self.gone.is_set() or self._writer is None:
            raise NetworkError("the child process has ended")
        if len(self._waiting) >= MAX_WAITING_REQUESTS:
            raise NetworkError("the child process does not keep up")
        self._number += 1
        number = self._number
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._writer.write(_encode({"id": number, "op": op, **values}))
        return await self._answer(number, op, answer, limit_s)

    async def kill(self) -> None:
        """End the child and the processes that it started, and wait until they are gone."""
        # the process was not waited for so far: its number, which is the group's too, cannot be another's
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await asyncio.to_thread(self._process.wait)
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
        for transport in self._transports:
            transport.close()
        if not self._transports:
            for pipe in (self._process.stdin, self._process.stdout):
                cast("IO[bytes]", pipe).close()
        await asyncio.to_thread(_await_group, self._process.pid, DHT_GONE_S)  # a port that they hold is wanted next

    async def _answer(
        self, number: int, op: str, answer: asyncio.Future[dict[str, Any]], limit_s: float
    ) -> dict[str, Any]:
        try:
            async with asyncio.timeout(limit_s):
                reply = await answer
        except TimeoutError:
            raise NetworkError(f"the child process did not answer {op!r} within {limit_s:.0f} s") from None
        finally:
            self._waiting.pop(number, None)
        if reply.get("ok") is not True:
            raise RequestError(str(reply.get("kind")), str(reply.get("error")))
        return reply

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Pass replies to the waiting calls, until the child's stdout ends."""
        try:
            while line := await reader.readline():
                reply: Any = json.loads(line)
                answer = self._waiting.get(reply["id"])
                if answer is not None and not answer.done():
                    answer.set_result(reply)
        except (ValueError, KeyError, TypeError, OSError) as error:
            reason = f"the child process writes something that is not a reply: {error}"
        else:
            reason = "the child process has ended"
        self.gone.set()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(NetworkError(reason))
                answer.exception()  # the caller may have given up waiting


class PidFile:
    """A file that names the child of a folder, so that the next owner can end a process that is still running."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def claim(self, scratch: str = "") -> tuple[str, int]:
        """Take the file over for a child that is about to be started.

        Returns the child's token, and the number of ended processes of an earlier child. `scratch`: a folder of the
        child, removed with it. NetworkError if the owner of the earlier child is another living process.
        """
        ended = self._end_earlier()
        token = secrets.token_hex(16)
        owner = os.getpid()
        entry = {"token": token, "owner": owner, "began": _began(owner), "scratch": scratch}
        fresh = self._file.with_suffix(".new")
        fresh.write_text(json.dumps(entry) + "\n", encoding="utf-8")
        os.replace(fresh, self._file)
        return token, ended

    def release(self) -> None:
        """Remove the file: no process is running any more."""
        self._file.unlink(missing_ok=True)

    def _end_earlier(self) -> int:
        """End the processes of an earlier child, remove its scratch folder, and return how many there were."""
        try:
            entry: Any = json.loads(self._file.read_text(encoding="utf-8"))
            token, owner, began = str(entry["token"]), int(entry["owner"]), int(entry["began"])
            scratch = str(entry["scratch"])
        except FileNotFoundError:
            return 0
        except (ValueError, KeyError, TypeError):
            return 0  # torn by a crash: it names nothing that could be looked for
        # the same moment, give or take a rounded hundredth
        if owner != os.getpid() and began and abs(_began(owner) - began) <= 1:
            raise NetworkError(f"{self._file.parent}: process {owner} runs a DHT node from this folder; stop it first")
        ended = end_by_token(token)
        if scratch and Path(scratch).name.startswith("dimat-"):
            shutil.rmtree(scratch, ignore_errors=True)
        return ended


def end_by_token(token: str, limit_s: float = 2.0) -> int:
    """Kill all processes of this user whose environment has the token; return their number.

    Waits for at most `limit_s` until they are gone, since the next child needs their resources, such as a port.
    """
    found = find_by_token(token)
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + limit_s
    while found and find_by_token(token) and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(found)


def find_by_token(token: str) -> list[int]:
    """Return the running processes of this user whose environment has the token."""
    found: list[int] = []
    for pid in psutil.pids():
        with suppress(psutil.Error):  # gone meanwhile, or another user's
            # the environment of a process that has ended and was not waited for yet is empty
            if pid != os.getpid() and psutil.Process(pid).environ().get(TOKEN_VARIABLE) == token:
                found.append(pid)
    return found


def _began(pid: int) -> int:
    """Return the start time of a process, in hundredths of a second since the machine booted; 0 if there is none.

    It is counted from the boot, as somebody may set the time of day meanwhile.
    """
    try:
        process = psutil.Process(pid)
        boot_s = psutil.boot_time()
        return 0 if process.status() == psutil.STATUS_ZOMBIE else round((process.create_time() - boot_s) * 100)
    except psutil.Error:
        return 0


def _encode(request: Mapping[str, Any]) -> bytes:
    line = json.dumps(request).encode() + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise NetworkError(f"a request of {len(line)} bytes to the child process; {MAX_LINE_BYTES} are allowed")
    return line


def _open_log(file: Path) -> IO[bytes]:
    """Open a log for appending, or start it anew if it has grown large."""
    large = file.exists() and file.stat().st_size > MAX_LOG_BYTES
    return file.open("wb" if large else "ab")


def _await_group(group: int, limit_s: float) -> None:
    """Wait until a process group has no members."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(0.01)
