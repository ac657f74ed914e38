"""A payload's blocks as they arrive: each block's hash is checked before it is written."""

from __future__ import annotations

import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from blake3 import blake3

from dimat.errors import DataError
from dimat.weights.durable import sync_folder
from dimat.weights.snapshot import Payload


class ReceivedBlocks:
    """The blocks of `payload` that have arrived in the file `path`; methods may be called from any thread.

    The file has its full length from the start, so that a full disk is noticed before anything is sent. Blocks in it
    from an earlier attempt or run count if their hash is right. `reserve_bytes`: disk space that stays free. DataError
    if the disk fails.
    """

    def __init__(self, path: Path, payload: Payload, reserve_bytes: int = 0) -> None:
        self.path = path
        self._payload = payload
        self._lock = threading.Lock()
        self._missing = set(range(len(payload.blocks)))
        # blocks of equal content come once
        self._places: defaultdict[str, list[int]] = defaultdict(list)
        for index, digest in enumerate(payload.blocks):
            self._places[digest].append(index)
        self._file = -1
        try:
            known = path.exists() and path.stat().st_size == payload.bytes
            if not known:
                free = shutil.disk_usage(path.parent).free
                if free < payload.bytes + reserve_bytes:
                    raise DataError(
                        f"no room for a snapshot of {payload.bytes:,} bytes in {path.parent}: {free:,} are free, of "
                        f"which {reserve_bytes:,} are reserved; make room, or lower disk_reserve_bytes"
                    )
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if known:
                for index in range(len(payload.blocks)):
                    self._check(index)
            else:
                os.ftruncate(self._file, payload.bytes)
                os.posix_fallocate(self._file, 0, payload.bytes)
        except OSError as error:
            self.close()
            path.unlink(missing_ok=True)
            raise DataError(f"cannot make {path} of {payload.bytes:,} bytes: {error.strerror or error}") from error

    @property
    def missing_bytes(self) -> int:
        """Bytes of the blocks that are missing; blocks of equal content count once."""
        with self._lock:
            return sum(self.length(places[0]) for places in self._places.values() if places[0] in self._missing)

    @property
    def whole(self) -> bool:
        """Whether every block has arrived."""
        with self._lock:
            return not self._missing

    def runs(self) -> list[tuple[int, int]]:
        """Return (first index, count) of each run of missing blocks; of blocks with equal content only the first."""
        with self._lock:
            wanted = sorted(places[0] for places in self._places.values() if places[0] in self._missing)
        runs: list[tuple[int, int]] = []
        for index in wanted:
            if runs and sum(runs[-1]) == index:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((index, 1))
        return runs

    def length(self, index: int) -> int:
        """Return the size of a block in bytes."""
        return min(self._payload.block_bytes, self._payload.bytes - index * self._payload.block_bytes)

    def write(self, index: int, chunks: Sequence[bytes]) -> bool:
        """Check a block's hash and write it to every place where its content belongs.

        False if the hash is wrong: then nothing is written and the block is still missing.
        """
        digest = blake3()
        for chunk in chunks:
            digest.update(chunk)
        expected = self._payload.blocks[index]
        if digest.hexdigest() != expected:
            return False
        with self._lock:
            for place in self._places[expected]:
                self._put(place, chunks)
        return True

    def fill(self, sources: Iterable[tuple[Path, Payload]]) -> None:
        """Copy missing blocks from other payload files; blocks that are damaged there stay missing."""
        for path, payload in sources:
            with self._lock:
                wanted = {self._payload.blocks[index] for index in self._missing}
            found = {digest: index for index, digest in enumerate(payload.blocks) if digest in wanted}
            if not found:
                continue
            try:
                with path.open("rb", buffering=0) as file:
                    for digest, index in found.items():
                        file.seek(index * payload.block_bytes)
                        self.write(self._places[digest][0], [file.read(payload.block_bytes)])
            except OSError:
                continue  # removed meanwhile: its blocks come over the network

    def finish(self, path: Path, *, durable: bool) -> None:
        """Rename the complete file to `path`; DataError if blocks are missing. `durable`: it survives power loss."""
        try:
            with self._lock:
                if self._missing:
                    raise DataError(f"{self.path} lacks {len(self._missing)} blocks")
                if durable:
                    os.fsync(self._file)
                os.close(self._file)
                self._file = -1
                self.path.replace(path)
                if durable:
                    sync_folder(path.parent)
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Close the file and keep it for another attempt."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    # ── with the lock held ───────────────────────────────────────────────────────────────────────────────────
    def _check(self, index: int) -> None:
        data = os.pread(self._file, self.length(index), index * self._payload.block_bytes)
        if blake3(data).hexdigest() == self._payload.blocks[index]:
            self._missing.discard(index)

    def _put(self, index: int, chunks: Sequence[bytes]) -> None:
        offset, length = index * self._payload.block_bytes, self.length(index)
        if self._file < 0:
            raise DataError(f"{self.path} is closed")
        try:
            written = os.pwritev(self._file, chunks, offset)
            while written < length:
                rest = b"".join(chunks)[written:]
                written += os.pwrite(self._file, rest, offset + written)
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error.strerror or error}") from error
        self._missing.discard(index)
