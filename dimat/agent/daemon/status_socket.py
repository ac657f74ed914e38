"""Serves an agent's status on a socket in its folder."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import psutil

from dimat.agent.daemon.folder import owner_of_folder, read_mark
from dimat.errors import DataError
from dimat.events.view import AgentView
from dimat.json_text import to_json
from dimat.reading import parse_json

SOCKET = "status.sock"
TIMEOUT_S = 5.0


class StatusSocket:
    """Answers each connection with one JSON object, then closes it.

    Only the agent's own user can connect.
    """

    def __init__(self, folder: Path, status: Callable[[], Mapping[str, object]]) -> None:
        self._folder = folder
        self._status = status
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen.

        A socket left behind by an earlier process is replaced (the folder's lock says that it has ended).
        """
        with _short(self._folder) as path:
            mask = os.umask(0o177)
            try:
                with suppress(FileNotFoundError):
                    os.unlink(path)
                self._server = await asyncio.start_unix_server(self._answer, path)
            except OSError as error:
                raise DataError(f"cannot listen on {self._folder / SOCKET}: {error.strerror or error}") from error
            finally:
                os.umask(mask)

    async def close(self) -> None:
        """Stop listening, and remove the socket; where that fails, the next life replaces it."""
        if self._server is not None:
            self._server.close()
            with suppress(OSError):
                (self._folder / SOCKET).unlink()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        del reader
        with suppress(OSError, TimeoutError):  # who asked has gone
            writer.write(to_json(dict(self._status())).encode() + b"\n")
            async with asyncio.timeout(TIMEOUT_S):
                await writer.drain()
        writer.close()


def ask(folder: Path) -> dict[str, Any]:
    """Return the status of the agent that runs in a folder; raises DataError if none does."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(TIMEOUT_S)
    try:
        with connection, _short(folder) as path:
            connection.connect(path)
            with connection.makefile("rb") as answer:
                found = parse_json(answer.read())
        if not isinstance(found, dict):
            raise ValueError("the program that answers is not an agent")
        return cast("dict[str, Any]", found)
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise DataError(f"no agent answers in {folder}: {_why_silent(folder, reason)}") from error


def _why_silent(folder: Path, reason: str) -> str:
    """Say of the agent of a folder why it does not answer: it is stopped, paused by a signal, or something else."""
    mark = read_mark(folder) if folder.is_dir() else None
    if mark is None:
        return f"it is not an agent's folder ({reason}); start one with: dimat agent FILE"
    name = f"{mark['agent']!r} of run {mark['run']!r}"
    owner = owner_of_folder(folder)
    if owner is None:
        return f"{name} is stopped; start it with: dimat agent FILE"
    try:
        paused = psutil.Process(owner).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        paused = False
    if paused:
        return f"{name} is stopped by a signal (SIGSTOP, Ctrl-Z); continue it with: kill -CONT {owner}"
    return f"{name}, process {owner}, is busy, or still starting ({reason}); ask again"


@contextmanager
def _short(folder: Path) -> Generator[str]:
    """Give a path to the socket that is short enough for the kernel (108 bytes), however deep the folder lies."""
    path = str(folder / SOCKET)
    if len(os.fsencode(path)) < 100:
        yield path
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)


def plain_view(view: AgentView) -> dict[str, object]:
    """Return the parts of an agent's status that come from its events, as plain values. Times are Unix seconds."""
    plain: dict[str, object] = {"agent": view.agent, "run": view.run, "warnings": list(view.warnings)}
    if view.trained is not None:
        plain["trained"] = {"round": view.trained.round, "loss": view.loss}
    if (merged := view.merged) is not None:
        plain["merged"] = {
            "round": merged.round,
            "heard": merged.heard,
            "expected": merged.expected,
            "accepted": merged.result.accepted,
            "before": dict(view.before),
            "after": dict(view.after),
            "weights": {part.agent: part.weight for part in merged.contributions},
        }
    if (kept := view.checkpoint) is not None:
        plain["checkpoint"] = {"round": kept.round, "stage": kept.stage, "time": kept.time_s}
    if view.left:
        plain["left"] = view.left
    return plain


def with_refused(
    peers: Mapping[str, Mapping[str, object]], refused: Mapping[str, int]
) -> dict[str, Mapping[str, object]]:
    """Return the states of peers, and how many offers of each the round has refused."""
    return {peer: {**state, "refused_offers": refused.get(peer, 0)} for peer, state in peers.items()}


def for_members(status: Mapping[str, object], folders: Iterable[Path]) -> dict[str, object]:
    """Return a status for other members: without this machine's process id and the paths of `folders`."""
    own = {key: value for key, value in status.items() if key not in ("folder", "pid")}
    # a path of one part is no secret, and may be a word: an agent's folder is often called as the agent is
    paths = {str(path) for folder in folders for path in (folder, folder.resolve()) if len(path.parts) > 1}
    return {key: without_paths(value, paths) for key, value in own.items()}


def without_paths(value: object, paths: Collection[str]) -> object:
    """Return plain values with the folders `paths` removed from their texts."""
    if isinstance(value, str):
        for path in sorted(paths, key=len, reverse=True):
            value = value.replace(path, "…")
        return value
    if isinstance(value, Mapping):
        known = cast("Mapping[object, object]", value)
        return {key: without_paths(each, paths) for key, each in known.items()}
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return [without_paths(each, paths) for each in cast("Iterable[object]", value)]
    return value
