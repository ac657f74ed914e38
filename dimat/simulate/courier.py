"""Carries snapshots from publishers to readers in virtual time, and knows which are on their way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from dimat import events as facts
from dimat.agent import messages as m
from dimat.errors import DataError, NetworkError
from dimat.net.memory import MemoryNetwork
from dimat.simulate.clock import Clock
from dimat.simulate.links import Links
from dimat.snapshot import Manifest


@dataclass(slots=True)
class Parcel:
    """A snapshot that a reader asked for in its round `number`. `manifest`: once it was found at its publisher;
    `flying`: on its way; `source`: what the store gave once it was there."""

    number: int
    action: m.Fetch
    manifest: Manifest | None = None
    flying: bool = False
    source: Any = None


class Courier:
    """`post(agent, time, event)` hands an agent an event later, in this life; `handle` at once; `emit` tells facts;
    `serves(agent)`: whether an agent's snapshots can be had now.

    What breaks off, or finds its publisher down or cut off, waits until it is back (`retry`); the reader's deadline
    bounds that.
    """

    def __init__(
        self,
        clock: Clock,
        network: MemoryNetwork,
        links: Links,
        post: Callable[[str, float, m.Event], None],
        handle: Callable[[str, m.Event], None],
        emit: Callable[[facts.Event], None],
        serves: Callable[[str], bool],
    ) -> None:
        self._clock = clock
        self._network = network
        self._links = links
        self._post = post
        self._handle = handle
        self._emit = emit
        self._serves = serves
        self._parcels: dict[str, dict[tuple[str, str], Parcel]] = {}

    def fetch(self, reader: str, number: int, action: m.Fetch) -> None:
        """Bring a snapshot for the reader's round `number`."""
        self.drop(reader, action.peer, action.root)
        parcel = Parcel(number, action)
        self._parcels.setdefault(reader, {})[action.peer, action.root] = parcel
        self._send(reader, parcel)

    def retry(self) -> None:
        """Go on with what waits for a publisher, where that can be reached by now."""
        for reader, parcels in self._parcels.items():
            for parcel in list(parcels.values()):
                if parcel.source is None and not parcel.flying:
                    self._send(reader, parcel)

    def _send(self, reader: str, parcel: Parcel) -> None:
        action, now = parcel.action, self._clock.now
        peer = action.peer
        if not self._serves(peer) or not self._links.reachable(reader, peer):
            return
        if parcel.manifest is None:
            try:
                parcel.manifest, size = self._network.ask(reader, peer, action.round)
            except NetworkError as error:
                self.drop(reader, peer, action.root)
                failed = m.FetchFailed(peer, action.round, action.root, str(error))
                self._post(reader, now + 2 * self._links.latency(reader, peer), failed)
                return
        else:
            size = parcel.manifest.payload.bytes
        manifest = parcel.manifest
        transfer = self._links.transfer(now, peer, reader, size)
        self._network.moved(reader, parcel.number, manifest, transfer.bytes_sent)
        if transfer.arrives_s is None:
            self.drop(reader, peer, action.root)
            failed = m.FetchFailed(peer, action.round, action.root, "it was lost on its way")
            self._post(reader, transfer.failed_s or now, failed)
            return
        parcel.flying = True
        self._clock.put(transfer.arrives_s, self._arrive, reader, parcel, manifest, transfer.bytes_sent)

    def _arrive(self, reader: str, parcel: Parcel, manifest: Manifest, bytes_sent: int) -> None:
        if not parcel.flying:
            return
        parcel.flying = False
        peer, number, root = parcel.action.peer, parcel.action.round, parcel.action.root
        try:
            parcel.source = self._network.receive(reader, manifest)
        except DataError as error:
            self.drop(reader, peer, root)
            self._handle(reader, m.FetchFailed(peer, number, root, str(error)))
            return
        self._emit(facts.SnapshotFetched(agent=reader, round=number, peer=peer, snapshot=root, bytes=bytes_sent))
        self._handle(reader, m.SnapshotReady(peer, number, root))

    def source(self, reader: str, peer: str, root: str) -> Any:
        """Return a snapshot that is there."""
        return self._parcels[reader][peer, root].source

    def drop(self, reader: str, peer: str, root: str) -> None:
        """Let go of a snapshot, there or on its way."""
        parcel = self._parcels.get(reader, {}).pop((peer, root), None)
        if parcel is not None:
            parcel.flying = False
            if parcel.manifest is not None:
                self._network.release(root)

    def drop_all(self, reader: str) -> None:
        """Let go of all that a reader has or awaits."""
        for key in list(self._parcels.get(reader, {})):
            self.drop(reader, *key)

    def break_off(self, hit: Callable[[str, str], bool]) -> None:
        """Break off what is on its way between (reader, publisher) pairs that are hit."""
        for reader, parcels in self._parcels.items():
            for (publisher, _), parcel in parcels.items():
                if parcel.flying and hit(reader, publisher):
                    # a new object, so that what is on its way finds its own one broken off when it arrives
                    parcel.flying = False
                    parcels[publisher, parcel.action.root] = replace(parcel)
