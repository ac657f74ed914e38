"""Serves payloads: opens one file a stream, reads ahead in threads, and sends it in chunks within all limits."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from time import monotonic

from dimat.errors import DataError
from dimat.net.compatibility import CHUNK_BYTES, SMALLEST_CHUNK_BYTES
from dimat.net.limits import Limits, Rate, Slots
from dimat.net.threads import Threads
from dimat.weights.snapshot import Payload

READ_BYTES = 4 * CHUNK_BYTES  # at a time, in a thread
SLOW_S, FAST_S = 2.0, 0.5  # that a message takes: shorter ones from here on, longer ones
Span = tuple[int, int]
"""Offset and length."""


class SlowReaderError(Exception):
    """A reader took no bytes for too long."""


class PayloadReader:
    """A payload file that is open for reading in threads."""

    def __init__(self, path: Path, payload: Payload) -> None:
        """Open it; DataError where it is missing or has another length than its record says."""
        self._lock = threading.Lock()
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"cannot read snapshot {path}: {error.strerror or error}") from error
        size = os.fstat(self._file).st_size
        if size != payload.bytes:
            self.close()
            raise DataError(f"snapshot {path} is damaged: {size} bytes, its manifest says {payload.bytes}")

    def read(self, spans: list[Span]) -> list[bytes]:
        """Read spans; DataError where the file is shorter or unreadable by now."""
        with self._lock:
            try:
                chunks = [os.pread(self._file, length, offset) for offset, length in spans]
            except OSError as error:
                raise DataError(f"cannot read a snapshot: {error.strerror or error}") from error
        if any(len(chunk) != length for chunk, (_, length) in zip(chunks, spans)):
            raise DataError("a snapshot is cut short on disk")
        return chunks

    def close(self) -> None:
        """Close it, once no thread reads from it."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1


class ChunkSizer:
    """How long the messages of a stream are: short ones at first and on a slow link, so that both sides see within
    seconds that bytes move, and `CHUNK_BYTES` where they go fast."""

    def __init__(self) -> None:
        self.bytes = SMALLEST_CHUNK_BYTES

    def cut(self, chunk: bytes) -> Iterator[bytes]:
        """Cut a chunk into messages; each is asked for when the one before is sent."""
        offset = 0
        while offset < len(chunk):
            whole = not offset and self.bytes >= len(chunk)
            part = chunk if whole else chunk[offset : offset + self.bytes]
            began = monotonic()
            yield part
            offset += len(part)
            took_s = monotonic() - began
            if took_s > SLOW_S:
                self.bytes = max(self.bytes // 2, SMALLEST_CHUNK_BYTES)
            elif took_s < FAST_S:
                self.bytes = min(self.bytes * 2, CHUNK_BYTES)


def spans(payload: Payload, first: int, blocks: int) -> Iterator[list[Span]]:
    """Cut a range of blocks into chunks, none across the end of a block, in groups of about `READ_BYTES`."""
    group: list[Span] = []
    held = 0
    for index in range(first, first + blocks):
        offset = index * payload.block_bytes
        end = min(offset + payload.block_bytes, payload.bytes)
        while offset < end:
            length = min(CHUNK_BYTES, end - offset)
            group.append((offset, length))
            offset += length
            held += length
            if held >= READ_BYTES:
                yield group
                group, held = [], 0
    if group:
        yield group


class Uploader:
    """Streams to readers. `sent`: bytes of payload by reader and encoding."""

    def __init__(self, limits: Limits, threads: Threads) -> None:
        self.sent: Counter[tuple[str, str]] = Counter()
        self.slots = Slots("transfers", limits.streams, limits.streams_per_peer)
        self._limits = limits
        self._threads = threads
        self._rate = Rate(limits.rate_mb_s)

    async def stream(
        self,
        reader: str,
        path: Path,
        payload: Payload,
        first: int,
        blocks: int,
        write: Callable[[bytes], Awaitable[None]],
        encoding: str = "fp32",
    ) -> None:
        """Send a range of blocks through `write`; `encoding` is what they are counted under. Raises DataError where
        the file is damaged, SlowReaderError where the reader takes nothing for `idle_s`."""
        file = await self._threads.submit(PayloadReader, path, payload)
        try:
            await self._send((reader, encoding), file, spans(payload, first, blocks), write)
        finally:
            # a thread may be reading: it is closed after that, and the event loop does not wait
            self._threads.submit(file.close)

    async def _send(
        self,
        counted: tuple[str, str],
        file: PayloadReader,
        groups: Iterator[list[Span]],
        write: Callable[[bytes], Awaitable[None]],
    ) -> None:
        pace = ChunkSizer()
        group = next(groups, None)
        ahead = None if group is None else self._threads.submit(file.read, group)
        while ahead is not None:
            chunks = await ahead
            group = next(groups, None)
            ahead = None if group is None else self._threads.submit(file.read, group)
            for chunk in chunks:
                for part in pace.cut(chunk):
                    await self._rate.pay(len(part))
                    try:
                        async with asyncio.timeout(self._limits.idle_s):
                            await write(part)
                    except TimeoutError:
                        raise SlowReaderError from None
                    self.sent[counted] += len(part)
