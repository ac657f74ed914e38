"""The network within one process: agents hand each other's snapshots over through a shared store.

It moves no bytes, yet counts those that a real network would have to: a payload once per reader, and a payload
that the reader still holds not again.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from dimat.errors import NetworkError
from dimat.snapshot import Manifest, SnapshotStore


class MemoryNetwork:
    """Publishes and fetches snapshots among the agents of one store. `sent`, `received`: bytes by (agent, round)."""

    def __init__(self, store: SnapshotStore) -> None:
        self.sent: Counter[tuple[str, int]] = Counter()
        self.received: Counter[tuple[str, int]] = Counter()
        self._store = store
        self._held: dict[tuple[str, str], str] = {}

    def publish(self, manifest: Manifest) -> None:
        """Offer a recorded snapshot to whoever asks."""
        self._store.publish(manifest)

    def fetch(self, reader: str, publisher: str, round_: int) -> tuple[Manifest, Path, int]:
        """Return manifest, path and bytes moved for `publisher`'s snapshot of a round, whole and checked.

        Raises NetworkError where it is offered no longer, DataError where it is damaged.
        """
        manifest = self._store.find(publisher, round_)
        if manifest is None:
            raise NetworkError(f"{publisher} holds no snapshot of round {round_} any more")
        path = self._store.verify(manifest.payload)
        moved = 0
        if self._held.get((reader, publisher)) != manifest.payload.root:
            moved = manifest.payload.bytes
            self._held[reader, publisher] = manifest.payload.root
            self.sent[publisher, round_] += moved
            self.received[reader, round_] += moved
        return manifest, path, moved
