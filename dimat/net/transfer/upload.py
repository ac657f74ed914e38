"""Uploads of payloads to readers: read ahead, in chunks, within slots and a rate."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from time import monotonic

from dimat.errors import DataError
from dimat.net.limits import CHUNK_BYTES, CHUNK_FAST_S, CHUNK_SLOW_S, MIN_CHUNK_BYTES, READ_AHEAD_BYTES, Limits
from dimat.net.threads import Threads
from dimat.net.throttle import Rate, Slots
from dimat.weights.snapshot import Payload

Span = tuple[int, int]
"""Offset and length."""


class SlowReaderError(Exception):
    """A reader took no bytes for `Limits.idle_s`."""


class PayloadReader:
    """A payload file that is open for reading in threads."""

    def __init__(self, path: Path, payload: Payload) -> None:
        """Open the file; DataError if it is missing or its size is not that of its payload."""
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
        """Return the bytes of spans; DataError if the file has become shorter or unreadable."""
        with self._lock:
            try:
                chunks = [os.pread(self._file, length, offset) for offset, length in spans]
            except OSError as error:
                raise DataError(f"cannot read a snapshot: {error.strerror or error}") from error
        if any(len(chunk) != length for chunk, (_, length) in zip(chunks, spans)):
            raise DataError("a snapshot is cut short on disk")
        return chunks

    def close(self) -> None:
        """Close the file, as soon as no thread reads from it."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1


class ChunkSizer:
    """Chooses the length of a stream's messages by its speed.

    Short ones at first and on a slow link, so that both sides see within seconds that bytes move; `CHUNK_BYTES` on a
    fast link.
    """

    def __init__(self) -> None:
        self.bytes = MIN_CHUNK_BYTES

    def cut(self, chunk: bytes) -> Iterator[bytes]:
        """Yield a chunk in messages; take the next one after the one before has been sent."""
        offset = 0
        while offset < len(chunk):
            whole = not offset and self.bytes >= len(chunk)
            part = chunk if whole else chunk[offset : offset + self.bytes]
            began = monotonic()
            yield part
            offset += len(part)
            took_s = monotonic() - began
            if took_s > CHUNK_SLOW_S:
                self.bytes = max(self.bytes // 2, MIN_CHUNK_BYTES)
            elif took_s < CHUNK_FAST_S:
                self.bytes = min(self.bytes * 2, CHUNK_BYTES)


def spans(payload: Payload, first: int, blocks: int) -> Iterator[list[Span]]:
    """Yield the chunks of a range of blocks, none across a block boundary, in groups of about `READ_AHEAD_BYTES`."""
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
            if held >= READ_AHEAD_BYTES:
                yield group
                group, held = [], 0
    if group:
        yield group


class Uploader:
    """Uploads to all readers. `sent`: bytes of payload, by reader and encoding."""

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
        """Send `blocks` blocks, from `first` on, through `write`, and count them under `encoding`.

        Raises DataError if the file is damaged, SlowReaderError if the reader takes no byte for
        `Limits.idle_s`.
        """
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
        sizer = ChunkSizer()
        group = next(groups, None)
        ahead = None if group is None else self._threads.submit(file.read, group)
        while ahead is not None:
            chunks = await ahead
            group = next(groups, None)
            ahead = None if group is None else self._threads.submit(file.read, group)
            for chunk in chunks:
                for part in sizer.cut(chunk):
                    await self._rate.pay(len(part))
                    try:
                        async with asyncio.timeout(self._limits.idle_s):
                            await write(part)
                    except TimeoutError:
                        raise SlowReaderError from None
                    self.sent[counted] += len(part)
