"""A link between two ends that a test can spoil: a TCP proxy in a thread of its own.

A fault strikes all connections, those that are open and those to come, until the link is healed: at once, or when
`after` more bytes have gone through in one direction. Bytes that are held back are not lost: they go on when the link
is healed, as TCP's own repeats would bring them.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from enum import Enum
from typing import Any, Literal, TypeVar

Direction = Literal["up", "down"]
"""Up is from whoever dials to the target."""
T = TypeVar("T")
WAIT_S = 60.0
PART_S = 0.5
PIECE = 16 * 2**10
AHEAD = 64  # pieces that were read and not yet sent on, of each direction of a connection
BUFFER = 128 * 2**10  # of each socket, so that few bytes are out of the proxy's sight


class Fault(Enum):
    RESET = "reset"  # RST to both ends
    BLACK_HOLE = "black hole"  # accepted, kept open, nothing goes through
    HALF_OPEN = "half-open"  # nothing goes through in the direction that was named
    FLIP = "flip"  # the next byte of that direction comes changed, once in each connection
    TRUNCATE = "truncate"  # closed in order, in the midst
    REFUSE = "refuse"  # open connections stay, new ones are refused


class _Connection:
    """Two sockets, and what is on its way between them."""

    def __init__(self, client: socket.socket, target: socket.socket) -> None:
        self.sources = {"up": client, "down": target}
        self.sinks = {"up": target, "down": client}
        self.ended = asyncio.Event()
        self.reset = False
        self.flipped: set[str] = set()

    def end(self, *, reset: bool) -> None:
        self.reset |= reset
        self.ended.set()

    def close(self) -> None:
        for end in self.sources.values():
            if self.reset:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()


class FaultProxy:
    """Carries bytes to `target`, a port on loopback; `with FaultProxy(port) as proxy`, and dial `proxy.port`.

    `connections`: accepted so far; `bytes`: sent on, by direction; `struck`: whether the fault is at work. May be used
    from any thread but its own.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)
        self._fault: Fault | None = None
        self._direction: Direction = "down"
        self._left = 0
        self._bytes_s: float | None = None
        self._latency_s = 0.0
        self._free_at = {"up": 0.0, "down": 0.0}
        self._changed = asyncio.Event()
        self._open: dict[_Connection, asyncio.Task[None]] = {}
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self.port = 0
        self.connections = 0
        self.struck = False
        self.bytes: Counter[str] = Counter()

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._run(self._close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(WAIT_S)
            self._loop.close()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    # ── what a test does to the link ─────────────────────────────────────────────────────────────────────────
    def inject(self, fault: Fault, direction: Direction = "down", after: int = 0) -> None:
        """Spoil the link when `after` more bytes have gone through in a direction."""
        self._tell(lambda: self._inject(fault, direction, after))

    def slow(self, *, bytes_s: float | None = None, latency_s: float = 0.0) -> None:
        """Carry at most so many bytes a second in each direction (all connections together), each so much later."""
        self._tell(lambda: self._slow(bytes_s, latency_s))

    def heal(self) -> None:
        """Take all faults away; connections that are still open go on."""
        self._run(self._heal())

    async def until_struck(self) -> None:
        """Wait until the fault that was injected is at work."""
        await self.until(lambda: self.struck)

    async def until(self, true: Callable[[], Any]) -> None:
        """Wait until a condition on the proxy's counts holds."""
        async with asyncio.timeout(WAIT_S):
            while not true():  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    # ── in the proxy's thread ────────────────────────────────────────────────────────────────────────────────
    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_S)

    def _tell(self, change: Callable[[], None]) -> None:
        done: concurrent.futures.Future[None] = concurrent.futures.Future()

        def call() -> None:
            try:
                change()
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)

        self._loop.call_soon_threadsafe(call)
        done.result(WAIT_S)

    def _inject(self, fault: Fault, direction: Direction, after: int) -> None:
        self._fault, self._direction, self._left, self.struck = fault, direction, after, False
        if not after:
            self._strike()

    def _slow(self, bytes_s: float | None, latency_s: float) -> None:
        self._bytes_s, self._latency_s = bytes_s, latency_s
        self._wake()

    async def _heal(self) -> None:
        self._fault, self.struck = None, False
        self._slow(None, 0.0)
        for connection in self._open:
            connection.flipped.clear()
        if self._listener is None:
            await self._listen()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _strike(self) -> None:
        self.struck = True
        if self._fault in (Fault.RESET, Fault.TRUNCATE):
            for connection in self._open:
                connection.end(reset=self._fault is Fault.RESET)
        if self._fault is Fault.REFUSE:
            self._stop_listening()

    async def _listen(self) -> None:
        listener = socket.create_server(("127.0.0.1", self.port), backlog=512)
        # what is accepted inherits it
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        listener.setblocking(False)
        self._listener = listener
        self.port = listener.getsockname()[1]
        self._accepting = self._loop.create_task(self._accept(listener))

    def _stop_listening(self) -> None:
        if self._listener is not None and self._accepting is not None:
            self._accepting.cancel()
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = self._accepting = None

    async def _close(self) -> None:
        self._stop_listening()
        tasks = list(self._open.values())
        for connection in self._open:
            connection.end(reset=False)
        await asyncio.gather(*tasks)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            client, _ = await self._loop.sock_accept(listener)
            self.connections += 1
            client.setblocking(False)
            target = socket.socket()
            target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            target.setblocking(False)
            connection = _Connection(client, target)
            self._open[connection] = self._loop.create_task(self._carry(connection))

    async def _carry(self, connection: _Connection) -> None:
        """Serve a connection from its acceptance to its end."""
        tasks: list[asyncio.Task[Any]] = []
        try:
            if self.struck and self._fault in (Fault.RESET, Fault.TRUNCATE):
                connection.end(reset=self._fault is Fault.RESET)
                return
            try:
                await self._loop.sock_connect(connection.sinks["up"], ("127.0.0.1", self._target))
            except OSError:
                connection.end(reset=True)
                return
            ended = self._loop.create_task(connection.ended.wait())
            pumps = [self._loop.create_task(self._pump(connection, direction)) for direction in ("up", "down")]
            both = self._loop.create_task(asyncio.wait(pumps))
            tasks = [ended, *pumps, both]
            await asyncio.wait([ended, both], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if not connection.reset:
                await self._part(connection)
            connection.close()
            del self._open[connection]

    async def _part(self, connection: _Connection) -> None:
        """End both directions in order: a socket that is closed with bytes unread would send a reset."""

        async def drain(end: socket.socket) -> None:
            with suppress(OSError):
                end.shutdown(socket.SHUT_WR)
                while await self._loop.sock_recv(end, PIECE):
                    pass

        with suppress(TimeoutError):
            async with asyncio.timeout(PART_S):
                await asyncio.gather(*map(drain, connection.sources.values()))

    async def _pump(self, connection: _Connection, direction: Direction) -> None:
        """Carry the bytes of one direction until its end."""
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(AHEAD)
        reading = self._loop.create_task(self._read(connection, direction, pieces))
        try:
            while True:
                came_at, data = await pieces.get()
                await self._arrived(came_at)
                await self._send(connection, direction, data)
                if not data:
                    return
        except OSError:
            connection.end(reset=True)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(
        self, connection: _Connection, direction: Direction, pieces: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        try:
            while data := await self._loop.sock_recv(connection.sources[direction], PIECE):
                await pieces.put((self._loop.time(), data))
            await pieces.put((self._loop.time(), b""))
        except OSError:
            connection.end(reset=True)

    async def _arrived(self, came_at: float) -> None:
        while (wait_s := came_at + self._latency_s - self._loop.time()) > 0:
            await self._pause(wait_s)

    async def _pause(self, wait_s: float | None) -> None:
        """Wait for a time, or until something is changed."""
        try:
            async with asyncio.timeout(wait_s):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _send(self, connection: _Connection, direction: Direction, data: bytes) -> None:
        """Send a piece on as the link is now; an empty one is the end of the direction."""
        sink = connection.sinks[direction]
        while True:
            while connection.ended.is_set() or self._held(direction):
                await self._pause(None)
            if not data:
                sink.shutdown(socket.SHUT_WR)
                return
            part = await self._afford(direction, self._whole(direction, data))
            if part is None:
                continue  # something has changed meanwhile
            data = data[len(part) :]
            await self._loop.sock_sendall(sink, self._bent(connection, direction, part))
            self._count(direction, len(part))
            if not data:
                return

    def _held(self, direction: Direction) -> bool:
        return self.struck and (
            self._fault is Fault.BLACK_HOLE or (self._fault is Fault.HALF_OPEN and self._direction == direction)
        )

    def _whole(self, direction: Direction, data: bytes) -> bytes:
        """Return what goes through in one go: up to where the fault strikes."""
        if self._fault is not None and not self.struck and direction == self._direction:
            return data[: self._left]
        return data

    async def _afford(self, direction: Direction, data: bytes) -> bytes | None:
        """Wait for as many bytes as the rate lets through."""
        bytes_s = self._bytes_s
        if bytes_s is None:
            return data
        part = data[: max(1, int(bytes_s / 20))]
        now = self._loop.time()
        if self._free_at[direction] > now:
            await self._pause(self._free_at[direction] - now)
            return None
        self._free_at[direction] = now + len(part) / bytes_s
        return part

    def _bent(self, connection: _Connection, direction: Direction, data: bytes) -> bytes:
        flips = self.struck and self._fault is Fault.FLIP and direction == self._direction
        if not flips or direction in connection.flipped:
            return data
        connection.flipped.add(direction)
        return bytes([data[0] ^ 0xFF]) + data[1:]

    def _count(self, direction: Direction, amount: int) -> None:
        self.bytes[direction] += amount
        if self._fault is not None and not self.struck and direction == self._direction:
            self._left -= amount
            if self._left <= 0:
                self._strike()
