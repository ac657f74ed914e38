"""The dashboard's server: the page, the state, and a stream of its changes.

The stream is Server-Sent Events. Each has an id made of the server's mark and a version of the state; a browser that
reconnects sends the last id it had, and receives the changes since, or everything if the mark is another server's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
import time
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from dimat.errors import DimatError
from dimat.ui.dashboard.api import StateApi
from dimat.ui.dashboard.guard import Guard
from dimat.ui.dashboard.record_reader import RecordReader
from dimat.ui.dashboard.reducer import RunState
from dimat.version import __version__

STATIC = Path(__file__).parent / "static"
READ_S = 0.5
"""Seconds between two reads of new events, and so the least between two messages to a browser."""
ASK_S = 2.0
"""Seconds between two rounds of asking agents for their status, while a page is open."""
BEAT_S = 15.0
MOST_READERS = 32


class StateSource(Protocol):
    """Source of the state. `view`: the agent whose view it is, "" for all; `damaged`: number of skipped lines."""

    state: RunState

    @property
    def damaged(self) -> int: ...
    @property
    def view(self) -> str: ...
    def read(self) -> bool:
        """Read new events; return whether there were any."""
        ...

    async def statuses(self) -> Mapping[str, Mapping[str, Any] | None]:
        """Return the status of agents that can be asked; None for one that should answer and does not."""
        ...

    def folder_of(self, agent: str) -> Path | None:
        """Return the folder with an agent's ledger."""
        ...

    @property
    def ledgers(self) -> list[Path]:
        """All folders with ledgers."""
        ...


class Dashboard:
    """The application over a source. Everything except reading ledgers happens in one event loop."""

    def __init__(self, source: StateSource) -> None:
        self._source = source
        self._api = StateApi(source.state)
        self._records = RecordReader()
        self._mark = secrets.token_hex(4)
        self._readers = 0
        self._looked_s = time.monotonic()
        self._changed = asyncio.Condition()
        self._over = False
        self._notice = ""

    def app(self) -> Starlette:
        """Return the ASGI application."""
        return Starlette(
            routes=[
                Route("/", self._page),
                Route("/healthz", self._health),
                Route("/api/state", self._state),
                Route("/api/events", self._events),
                Route("/api/merges", self._merges),
                Route("/api/curves", self._curves),
                Route("/api/lineage", self._lineage),
                Route("/api/alignment", self._alignment),
                Mount("/static", _Static(directory=STATIC)),
            ]
        )

    # ── what goes on beside the answers ──────────────────────────────────────────────────────────────────────
    async def watch(self) -> None:
        """Read new events and update the agents' health, until cancelled."""
        state = self._source.state
        asking: asyncio.Task[None] | None = None
        try:
            while True:
                before = state.version
                try:
                    self._source.read()
                    self._notice = ""
                except DimatError as error:  # the page stays, and says so
                    self._notice = str(error)
                state.refresh(time.time())
                if asking is None or asking.done():
                    # a plain task: one that fails is followed by the next, where a group would end the page
                    asking = asyncio.create_task(self._ask())
                if state.version != before:
                    async with self._changed:
                        self._changed.notify_all()
                await asyncio.sleep(READ_S)
        finally:
            if asking is not None:
                asking.cancel()
            self._over = True
            async with self._changed:
                self._changed.notify_all()

    async def _ask(self) -> None:
        if self._readers or time.monotonic() - self._looked_s < 2 * ASK_S:
            for agent, status in (await self._source.statuses()).items():
                self._source.state.take_status(agent, status, time.time())
        await asyncio.sleep(ASK_S)

    # ── answers ──────────────────────────────────────────────────────────────────────────────────────────────
    def _since(self, version: int) -> dict[str, Any]:
        news = self._api.since(version)
        news["run"] |= {
            "damaged": self._source.damaged,
            "view": self._source.view,
            "dimat": __version__,
            "notice": self._notice,
        }
        return {**news, "mark": self._mark, "time_s": time.time()}

    async def _page(self, request: Request) -> Response:
        del request
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    async def _health(self, request: Request) -> Response:
        del request
        return PlainTextResponse("ok\n")

    async def _state(self, request: Request) -> Response:
        del request
        self._looked_s = time.monotonic()
        self._source.state.refresh(time.time())
        return JSONResponse(self._since(0))

    async def _events(self, request: Request) -> Response:
        if self._readers >= MOST_READERS:
            return PlainTextResponse("too many pages are open\n", status_code=503, headers={"retry-after": "10"})
        given = request.headers.get("last-event-id") or request.query_params.get("since", "")
        mark, _, version = given.partition("-")
        whole = mark == self._mark and version.isascii() and version.isdigit() and len(version) < 16
        known = int(version) if whole and int(version) <= self._source.state.version else 0
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(self._stream(known), media_type="text/event-stream", headers=headers)

    async def _stream(self, version: int) -> AsyncGenerator[str]:
        self._readers += 1
        try:
            yield "retry: 1000\n\n"
            while not self._over:
                if self._source.state.version > version or version == 0:
                    news = self._since(version)
                    version = news["version"]
                    yield f"id: {self._mark}-{version}\ndata: {json.dumps(news, allow_nan=False)}\n\n"
                    await asyncio.sleep(READ_S)
                    continue
                try:
                    async with self._changed, asyncio.timeout(BEAT_S):
                        await self._changed.wait()
                except TimeoutError:
                    yield ": still here\n\n"
        finally:
            self._readers -= 1

    async def _merges(self, request: Request) -> Response:
        query = request.query_params
        round_ = query.get("round", "")
        return JSONResponse(
            self._api.merges(
                query.get("agent", ""),
                _whole(round_, "round") if round_ else None,
                _whole(query.get("offset", "0"), "offset"),
                _whole(query.get("limit", "50"), "limit"),
            )
        )

    async def _curves(self, request: Request) -> Response:
        return JSONResponse(self._api.curves(request.query_params.getlist("agent")[:100]))

    async def _lineage(self, request: Request) -> Response:
        agent = request.query_params.get("agent", "") or self._source.view
        if agent not in self._source.state.agents:
            return JSONResponse({"error": "no such agent in this run"}, status_code=404)
        folder = self._source.folder_of(agent)
        if folder is None:
            return JSONResponse({"error": f"the ledger of {agent} is not in this folder, but on its own machine"})
        try:
            found = await run_in_threadpool(self._records.lineage, agent, folder, self._source.ledgers)
        except DimatError as error:
            return JSONResponse({"error": str(error)})
        return JSONResponse(found)

    async def _alignment(self, request: Request) -> Response:
        agents = request.query_params.getlist("agent")[:100]
        try:
            moves = await run_in_threadpool(self._records.moves, agents, self._source.ledgers)
        except DimatError as error:
            return JSONResponse({"error": str(error)})
        return JSONResponse({"moves": moves, "adoptions": self._api.adoptions(agents)})


class _Static(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["cache-control"] = "no-cache"  # asked again, answered with 304 while it is the same
        return response


def _whole(value: str, what: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) < 10):
        raise HTTPException(400, f"{what} must be a whole number")
    return int(value)


class Server:
    """Serves a source on an open socket. `run` serves until `stop` is called, from any thread."""

    def __init__(self, source: StateSource, opened: socket.socket, host: str, token: str | None) -> None:
        self._source = source
        self._socket = opened
        self._host = host
        self._token = token
        self._server: _Uvicorn | None = None
        self._stopped = False

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._socket.getsockname()[1])

    @property
    def address(self) -> str:
        """The address to open, with a placeholder for the token if one is needed."""
        shown = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{shown}:{self.port}/{'' if self._token is None else '?token=TOKEN'}"

    async def run(self) -> None:
        """Serve until `stop`, or until a signal if this is the main thread."""
        dashboard = Dashboard(self._source)
        config = uvicorn.Config(
            Guard(dashboard.app(), self._host, self.port, self._token),
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,  # addresses hold the token once
            server_header=False,
            timeout_graceful_shutdown=2,
            limit_concurrency=200,
        )
        server = self._server = _Uvicorn(config)
        # plain tasks: where one fails, uvicorn is told to end, which a group would cancel amidst its answers
        watching = asyncio.create_task(dashboard.watch())
        watching.add_done_callback(lambda _: server.end())  # a page that learns nothing new is no good
        ending = asyncio.create_task(self._end(server, watching))
        try:
            if not self._stopped:
                await server.serve(sockets=[self._socket])
        finally:
            ending.cancel()
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching

    async def _end(self, server: _Uvicorn, watching: asyncio.Task[None]) -> None:
        """End the streams when the server should end: it waits for them."""
        await server.ending.wait()
        watching.cancel()

    def stop(self) -> None:
        """Make `run` return soon."""
        self._stopped = True
        if self._server is not None:
            self._server.end()


class _Uvicorn(uvicorn.Server):
    """A uvicorn server whose end can be awaited. Created in its loop."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ending = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        super().handle_exit(sig, frame)
        self.end()

    def end(self) -> None:
        """End soon; may be called from any thread."""
        self.should_exit = True
        with contextlib.suppress(RuntimeError):  # its loop is over
            self._loop.call_soon_threadsafe(self.ending.set)
