"""The network within one process: agents hand each other's snapshots over through a shared store.

It moves no bytes, yet counts those that a real network would have to: a payload once per reader, and a payload
that the reader still holds not again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from dimat.errors import NetworkError
from dimat.snapshot import Manifest, Payload


class Store(Protocol):
    """What keeps snapshots for the network: `dimat.snapshot.SnapshotStore`, or one in memory."""

    def publish(self, manifest: Manifest) -> None:
        """Offer a recorded snapshot; the agent's oldest ones may be let go."""
        ...

    def offered(self, agent: str) -> Sequence[Manifest]:
        """Return the manifests of an agent that are still held, oldest first."""
        ...

    def find(self, agent: str, round_: int) -> Manifest | None:
        """Return the manifest that `agent` published for a round, if it is still held."""
        ...

    def verify(self, payload: Payload) -> Any:
        """Return a payload, or where it lies, whole and checked; DataError where it is damaged."""
        ...

    def hold(self, root: str) -> None:
        """Keep a payload until `release`, whatever its publisher does."""
        ...

    def release(self, root: str) -> None:
        """Undo one `hold`."""
        ...


class MemoryNetwork:
    """Publishes and hands over snapshots among the agents of one store. `sent`: bytes by publisher and the snapshot's
    round; `received`: bytes by reader and its own round."""

    def __init__(self, store: Store) -> None:
        self.sent: Counter[tuple[str, int]] = Counter()
        self.received: Counter[tuple[str, int]] = Counter()
        self._store = store
        self._held: dict[tuple[str, str], str] = {}

    def publish(self, manifest: Manifest) -> None:
        """Offer a recorded snapshot to whoever asks; offering it again, after a restart, changes nothing."""
        if self._store.find(manifest.agent, manifest.round) is None:
            self._store.publish(manifest)

    def offered(self, publisher: str) -> Sequence[Manifest]:
        """Return what `publisher` offers, oldest first."""
        return self._store.offered(publisher)

    def ask(self, reader: str, publisher: str, round_: int) -> tuple[Manifest, int]:
        """Return `publisher`'s manifest of a round, held for `reader` until `release`, and the bytes to be moved.

        Raises NetworkError where it is offered no longer.
        """
        manifest = self._store.find(publisher, round_)
        if manifest is None:
            raise NetworkError(f"{publisher} holds no snapshot of round {round_} any more")
        self._store.hold(manifest.payload.root)
        have = self._held.get((reader, publisher)) == manifest.payload.root
        return manifest, 0 if have else manifest.payload.bytes

    def moved(self, reader: str, round_: int, manifest: Manifest, bytes_: int) -> None:
        """Count bytes that were moved for `reader`'s round, those of attempts that failed too."""
        self.sent[manifest.agent, manifest.round] += bytes_
        self.received[reader, round_] += bytes_

    def receive(self, reader: str, manifest: Manifest) -> Any:
        """Return the payload that was asked for, or where it lies, whole and checked; DataError where it is damaged."""
        payload = self._store.verify(manifest.payload)
        self._held[reader, manifest.agent] = manifest.payload.root
        return payload

    def release(self, root: str) -> None:
        """Let go of a snapshot that was asked for."""
        self._store.release(root)
