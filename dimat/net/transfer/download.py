"""Downloads one payload from a peer: missing blocks only, retried when it breaks."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import dataclass, field
from random import Random
from typing import Any

from grpc import aio

from dimat.errors import NetworkError
from dimat.net.backoff import Backoff
from dimat.net.limits import BLOCK_ATTEMPTS, CHUNK_BYTES, MIN_CHUNK_BYTES, WRITES_AHEAD, Limits
from dimat.net.peers.connection import Code, Connection, ConnectionBrokenError, error_text
from dimat.net.peers.link import PeerLink
from dimat.net.threads import Threads
from dimat.net.throttle import Turn, Turns
from dimat.net.transfer.received_blocks import ReceivedBlocks
from dimat.weights.snapshot import Payload

EOF: Any = aio.EOF  # pyright: ignore[reportAttributeAccessIssue]  # read at the end of a stream

# answers that another attempt does not change; all others are a matter of the connection
FINAL = {
    Code.NOT_FOUND: "",
    Code.PERMISSION_DENIED: "",
    Code.DATA_LOSS: "",
    Code.OUT_OF_RANGE: "",
    Code.INVALID_ARGUMENT: "",
    Code.UNIMPLEMENTED: "it does not serve snapshots: ",
}


class GoneError(NetworkError):
    """A peer's payload can no longer be fetched; the blocks that have arrived are of no use."""


class WrongBlockError(Exception):
    """A block has arrived in full, with another hash than promised."""

    def __init__(self, index: int) -> None:
        super().__init__(f"block {index}")
        self.index = index


@dataclass(slots=True)
class DownloadStats:
    """Counts of one fetch, and of all fetches.

    `received`: bytes of payload in all fetches, by peer and encoding; `retries`: attempts after the first in all
    fetches, by peer; `bytes`: of this fetch; `encoding`: of the payload that is being downloaded; `wrong`: how often a
    block had a wrong hash, by payload and index.
    """

    received: Counter[tuple[str, str]]
    retries: Counter[str]
    bytes: int = 0
    encoding: str = "fp32"
    wrong: Counter[tuple[str, int]] = field(default_factory=Counter[tuple[str, int]])

    def count(self, peer: str, amount: int) -> None:
        """Count a chunk."""
        self.bytes += amount
        self.received[peer, self.encoding] += amount


async def download(
    link: PeerLink,
    payload: Payload,
    received: ReceivedBlocks,
    stats: DownloadStats,
    *,
    limits: Limits,
    turns: Turns,
    threads: Threads,
    generator: Random,
) -> None:
    """Download the blocks of `payload` that `received` lacks, until it is complete.

    `turns` bounds the concurrent downloads.

    Raises GoneError if the peer does not offer it any more or sends a block with a wrong hash `BLOCK_ATTEMPTS`
    times, and NetworkError if the peer is no longer followed or is incompatible.
    """
    backoff = Backoff(limits.backoff_first_s, limits.backoff_last_s, generator)
    while not received.whole:
        connection = await link.connection()
        before = received.missing_bytes
        try:
            async with link.streams, turns.take(link.peer) as turn:
                with connection.transfers.one():
                    for first, count in received.runs():
                        await _run(connection, payload, first, count, received, stats, limits.idle_s, threads, turn)
        except WrongBlockError as wrong:
            stats.wrong[payload.root, wrong.index] += 1
            if stats.wrong[payload.root, wrong.index] >= BLOCK_ATTEMPTS:
                raise GoneError(
                    f"{link.peer} sends other content than it promised: block {wrong.index} of snapshot "
                    f"{payload.root[:12]}… has a wrong hash, {BLOCK_ATTEMPTS} times; its disk or the link is damaged, "
                    "or it lies"
                ) from None
            stats.retries[link.peer] += 1
            continue
        except aio.AioRpcError as error:
            if error.code() in FINAL:
                raise GoneError(f"{link.peer}: {FINAL[error.code()]}{error_text(error)}") from None
            # a peer that is only busy keeps its connection
            if error.code() is not Code.RESOURCE_EXHAUSTED:
                link.drop(connection, error_text(error))
        except ConnectionBrokenError as error:
            link.drop(connection, str(error))
        if received.missing_bytes < before:
            backoff.reset()
        if not received.whole:
            stats.retries[link.peer] += 1
            await asyncio.sleep(backoff.next())


async def _run(
    connection: Connection,
    payload: Payload,
    first: int,
    count: int,
    received: ReceivedBlocks,
    stats: DownloadStats,
    idle_s: float,
    threads: Threads,
    turn: Turn,
) -> None:
    """Download a run of blocks on one stream, while earlier ones are hashed and written in threads."""
    call = connection.fetch(payload.root, first, count)
    writes: deque[tuple[int, asyncio.Future[bool]]] = deque()
    try:
        for index in range(first, first + count):
            chunks = await _block(call, connection, received.length(index), stats, idle_s)
            turn.moved()
            if len(writes) == WRITES_AHEAD:
                await _written(*writes.popleft())
            writes.append((index, threads.submit(received.write, index, chunks)))
        if await _read(call, idle_s) is not EOF:
            raise GoneError(f"{connection.peer} sends more than it was asked for")
        while writes:
            await _written(*writes.popleft())
    finally:
        call.cancel()
        # blocks that came whole count, whatever broke off after them
        for _, write in writes:
            await asyncio.wait([write])


async def _written(index: int, write: asyncio.Future[bool]) -> None:
    if not await write:
        raise WrongBlockError(index)


async def _block(call: Any, connection: Connection, length: int, stats: DownloadStats, idle_s: float) -> list[bytes]:
    """Read the chunks of one block."""
    chunks: list[bytes] = []
    while length:
        chunk = await _read(call, idle_s)
        if chunk is EOF:
            raise ConnectionBrokenError("the stream ended early")
        connection.heard()
        stats.count(connection.peer, len(chunk))
        if not min(MIN_CHUNK_BYTES, length) <= len(chunk) <= min(CHUNK_BYTES, length):
            raise GoneError(f"{connection.peer} sends a chunk of {len(chunk)} bytes when {length} of a block are left")
        chunks.append(chunk)
        length -= len(chunk)
    return chunks


async def _read(call: Any, idle_s: float) -> Any:
    """Read a message; ConnectionBrokenError if none arrives for `idle_s`, or the channel was closed."""
    try:
        async with asyncio.timeout(idle_s):
            return await call.read()
    except TimeoutError:
        raise ConnectionBrokenError(f"no byte for {idle_s:g} s") from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ConnectionBrokenError("the connection was closed") from None
