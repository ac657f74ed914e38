"""The network within one process: snapshots change hands through a shared store.

It moves no bytes, but counts those that a real network would send: the cheapest form of a snapshot that the reader can
decode (`exchange.encoding`), without the parts that the reader already holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from dimat.errors import DataError, NetworkError
from dimat.weights.snapshot import Manifest, Payload


class Store(Protocol):
    """Keeps snapshots for the network: a `SnapshotStore` on disk, or one in memory."""

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
        """Keep a payload until `release`, even if its publisher lets it go."""
        ...

    def release(self, root: str) -> None:
        """Undo one `hold`."""
        ...


class MemoryNetwork:
    """Publishes and hands over snapshots among the agents of one store.

    `sent`: bytes by publisher and the snapshot's round; `received`: bytes by reader and its own round.
    """

    def __init__(self, store: Store) -> None:
        self.sent: Counter[tuple[str, int]] = Counter()
        self.received: Counter[tuple[str, int]] = Counter()
        self._store = store
        # by reader and publisher, the payload that was moved last and how many bytes of it are held
        self._held: dict[tuple[str, str], tuple[str, int]] = {}
        self._whole: dict[tuple[str, str], str] = {}  # the last one that came whole: deltas are taken to it

    def hold(self, root: str) -> None:
        """Keep a payload in the store until `release`."""
        self._store.hold(root)

    def release(self, root: str) -> None:
        """Undo one `hold` or `ask`."""
        self._store.release(root)

    def publish(self, manifest: Manifest) -> None:
        """Offer a recorded snapshot to every agent that asks.

        Offering it again, after a restart, changes nothing.
        """
        if self._store.find(manifest.agent, manifest.round) is None:
            self._store.publish(manifest)

    def offered(self, publisher: str) -> Sequence[Manifest]:
        """Return what `publisher` offers, oldest first."""
        return self._store.offered(publisher)

    def ask(self, publisher: str, round_: int, root: str) -> Manifest:
        """Return `publisher`'s manifest of a snapshot, held until `release`.

        Raises NetworkError where it is not offered, or not any longer.
        """
        manifest = self._store.find(publisher, round_)
        if manifest is None:
            raise NetworkError(f"{publisher} holds no snapshot of round {round_} any more")
        if manifest.payload.root != root:
            raise NetworkError(f"{publisher} offers no snapshot {root[:12]}… of round {round_}")
        self._store.hold(root)
        return manifest

    def missing(self, reader: str, manifest: Manifest) -> int:
        """Return how many bytes of a snapshot a reader does not hold."""
        root, bytes_ = self._held.get((reader, manifest.agent), ("", 0))
        if root == manifest.payload.root == self._whole.get((reader, manifest.agent)):
            return 0
        return self._bytes(reader, manifest) - (bytes_ if root == manifest.payload.root else 0)

    def _bytes(self, reader: str, manifest: Manifest) -> int:
        """Return the bytes of the cheapest form of a snapshot for a reader."""
        base = self._whole.get((reader, manifest.agent), "")
        forms = [form.payload.bytes for form in manifest.forms if form.after in ("", base)]
        return min([manifest.payload.bytes, *forms])

    def moved(self, reader: str, round_: int, manifest: Manifest, sent: int, there: int) -> None:
        """Count bytes that were sent for `reader`'s round, those of attempts that failed too.

        `there` of them have reached it.
        """
        self.sent[manifest.agent, manifest.round] += sent
        self.received[reader, round_] += sent
        if there:
            link, root = (reader, manifest.agent), manifest.payload.root
            missing = self.missing(reader, manifest) - there
            self._held[link] = (root, self._bytes(reader, manifest) - missing)
            if missing <= 0:
                self._whole[link] = root

    def receive(self, reader: str, manifest: Manifest) -> Any:
        """Return the payload that was moved, or where it lies, whole and checked.

        DataError where it is damaged, and then the reader holds nothing of it.
        """
        try:
            return self._store.verify(manifest.payload)
        except DataError:
            self._held.pop((reader, manifest.agent), None)
            self._whole.pop((reader, manifest.agent), None)
            raise
