"""An agent's own dashboard: its view of itself and its peers, served from a thread.

The agent's loop only appends its events to a bounded queue; everything else happens in the thread, with a loop of its
own. While a page is open, that loop asks the agent's for its status every few seconds, and its peers for theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dimat import events
from dimat.agent.daemon.daemon import Daemon
from dimat.errors import DimatError
from dimat.net.peers.query import query_peer
from dimat.ui.dashboard.field_values import mapping
from dimat.ui.dashboard.guard import check_exposure, open_socket, parse_listen, read_token
from dimat.ui.dashboard.reducer import RunState
from dimat.ui.dashboard.server import Server

MOST_WAITING = 10_000
ANSWER_S = 5.0
PEERS_S = 10.0
"""Seconds between two rounds of asking peers."""
MOST_ASKED = 16
"""Peers that are asked in one round; if there are more, they take turns."""

Statuses = Mapping[str, Mapping[str, Any] | None]


class AgentDashboard:
    """Serves an agent's view; a listener of its events, and a context manager around its run.

    Raises SecurityError for a token that is missing or readable by others, NetworkError if the port cannot be opened.
    """

    def __init__(self, daemon: Daemon, listen: str, token_file: Path | None = None) -> None:
        host, port = parse_listen(listen)
        token = None if token_file is None else read_token(token_file)
        check_exposure(host, token)
        self._socket = open_socket(host, port)
        self._source = _OwnView(daemon)
        self._server = Server(self._source, self._socket, host, token)
        self._thread = threading.Thread(target=self._serve, name="dashboard", daemon=True)

    @property
    def address(self) -> str:
        """The address to open."""
        return self._server.address

    def __call__(self, event: events.Event) -> None:
        """Take an event; called in the agent's loop, and returns at once."""
        self._source.take(event)

    def __enter__(self) -> AgentDashboard:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop()
        self._thread.join(ANSWER_S)
        self._socket.close()

    def _serve(self) -> None:
        try:
            asyncio.run(self._server.run())
        except Exception as error:  # the agent goes on without it
            self._source.failed(f"the dashboard has ended: {type(error).__name__}: {error}")


class _OwnView:
    """The state as this agent sees it."""

    def __init__(self, daemon: Daemon) -> None:
        self.state = RunState()
        self.view = daemon.setup.name
        self.damaged = 0
        self._daemon = daemon
        self._waiting: deque[events.Event] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked_s = float("-inf")
        self._turn = 0
        self.state.run["metric"] = daemon.setup.schedule.metric
        self.state.run["rounds"] = daemon.setup.schedule.rounds
        self.state.run["method"] = daemon.setup.config.merge.method or ""

    def take(self, event: events.Event) -> None:
        """Keep an event until the dashboard's thread takes it. Called in the agent's loop, except for a tracker's
        message that it has ended, which comes from the tracker's thread and may be the first of all."""
        if self._loop is None:
            with contextlib.suppress(RuntimeError):
                self._loop = asyncio.get_running_loop()
        if len(self._waiting) >= MOST_WAITING:
            self.state.left_out += 1
            return
        self._waiting.append(event)

    def failed(self, message: str) -> None:
        """Let the agent report that the dashboard has ended. Called from the dashboard's thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the agent has ended too
                self._loop.call_soon_threadsafe(self._daemon.runner.noticed, message)

    def read(self) -> bool:
        """Process the events that have arrived."""
        found = bool(self._waiting)
        while self._waiting:
            self.state.take(self._waiting.popleft().to_dict())
        return found

    async def statuses(self) -> Statuses:
        """Return the agent's status, and those of peers that answered."""
        if self._loop is None:
            return {}
        look = self._look()
        try:
            future = asyncio.run_coroutine_threadsafe(look, self._loop)
        except RuntimeError:  # the agent's loop is over
            look.close()
            return {}
        try:
            async with asyncio.timeout(ANSWER_S):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            return {}

    async def _look(self) -> Statuses:
        """Return the status of the agent and its peers' addresses. Called in the agent's loop."""
        own = self._daemon.status()
        statuses: dict[str, Mapping[str, Any] | None] = {self.view: own}
        if time.monotonic() - self._asked_s >= PEERS_S:
            self._asked_s = time.monotonic()
            links = {peer: mapping(link) for peer, link in mapping(own.get("peers")).items()}
            reached = [(peer, str(link.get("address"))) for peer, link in links.items() if link.get("connected")]
            turn = [reached[(self._turn + i) % len(reached)] for i in range(min(MOST_ASKED, len(reached)))]
            self._turn += len(turn)
            answers = await asyncio.gather(*(self._ask(peer, address) for peer, address in turn))
            statuses |= {peer: status for peer, status in answers if status is not None}
        return statuses

    async def _ask(self, peer: str, address: str) -> tuple[str, Mapping[str, Any] | None]:
        try:
            async with (
                asyncio.timeout(ANSWER_S / 2),
                query_peer(peer, address, self.view, self._daemon.identity) as asked,
            ):
                return peer, await asked.status()
        except (DimatError, TimeoutError):
            return peer, None  # its link tells how it is reached

    def folder_of(self, agent: str) -> Path | None:
        """Return the agent's own folder: it has no ledgers of others."""
        return self._daemon.folder.path if agent == self.view else None

    @property
    def ledgers(self) -> list[Path]:
        """The agent's own folder."""
        return [self._daemon.folder.path]
