"""Carries snapshots from publishers to readers in virtual time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dimat import events
from dimat.agent.protocol import messages as m
from dimat.errors import DataError, NetworkError
from dimat.simulate.in_process_network import MemoryNetwork
from dimat.simulate.node import Node
from dimat.simulate.world.clock import Clock
from dimat.simulate.world.link_model import Links, Transfer
from dimat.weights.snapshot import Manifest


@dataclass(slots=True)
class PendingTransfer:
    """A snapshot that `reader` asked for in its round `number`.

    `manifest`: once it was found at its publisher; `transfer`: while it is on its way, and `due` is the number of its
    arrival in the queue; `sent`: bytes that moved for it so far, those of attempts that failed too; `source`: what the
    store gave once it was there.
    """

    reader: str
    number: int
    action: m.Fetch
    manifest: Manifest | None = None
    transfer: Transfer | None = None
    due: int = 0
    sent: int = 0
    source: Any = None


class TransferScheduler:
    """`post(agent, time, event)` hands an agent an event later, in this life; `handle` at once.

    `emit` tells facts.

    What breaks off, or finds its publisher down or cut off, waits until it is back (`retry`), and then goes on with
    what is missing; the reader's deadline bounds that. Bytes are counted when a transfer ends, as many as were sent
    until then, however it ends.
    """

    def __init__(
        self,
        clock: Clock,
        network: MemoryNetwork,
        links: Links,
        nodes: Mapping[str, Node],
        post: Callable[[str, float, m.Event], None],
        handle: Callable[[str, m.Event], None],
        emit: Callable[[events.Event], None],
    ) -> None:
        self._clock = clock
        self._network = network
        self._links = links
        self._nodes = nodes
        self._post = post
        self._handle = handle
        self._emit = emit
        self._parcels: defaultdict[str, dict[tuple[str, int, str], PendingTransfer]] = defaultdict(dict)
        # by publisher what is on its way from it, in the order in which it was asked for
        self._flying: defaultdict[str, dict[tuple[str, int, str], PendingTransfer]] = defaultdict(dict)
        self._replanned: set[str] = set()

    def fetch(self, reader: str, number: int, action: m.Fetch) -> None:
        """Bring a snapshot for the reader's round `number`."""
        key = action.peer, action.round, action.root
        self.drop(reader, *key)
        parcel = self._parcels[reader][key] = PendingTransfer(reader, number, action)
        self._send(parcel)

    def retry(self) -> None:
        """Go on with what waits for a publisher, where that can be reached by now."""
        for parcels in self._parcels.values():
            for parcel in list(parcels.values()):
                if parcel.source is None and parcel.transfer is None:
                    self._send(parcel)

    def source(self, reader: str, peer: str, root: str) -> Any:
        """Return a snapshot that is there, of whatever round it has this content."""
        held = self._parcels[reader].items()
        return next(p.source for (of, _, what), p in held if (of, what) == (peer, root) and p.source is not None)

    def drop(self, reader: str, peer: str, number: int, root: str) -> None:
        """Let go of a snapshot of round `number`, there or on its way."""
        parcel = self._parcels[reader].pop((peer, number, root), None)
        if parcel is None:
            return
        self._break_off(parcel)
        if parcel.manifest is not None:
            self._network.release(root)

    def drop_all(self, reader: str) -> None:
        """Let go of all that a reader has or awaits."""
        for key in list(self._parcels[reader]):
            self.drop(reader, *key)

    def break_off(self, hit: Callable[[str, str], bool]) -> None:
        """Break off what is on its way between (reader, publisher) pairs that are hit."""
        for publisher, flying in self._flying.items():
            for parcel in list(flying.values()):
                if hit(parcel.reader, publisher):
                    self._break_off(parcel)

    # ── on its way ───────────────────────────────────────────────────────────────────────────────────────────
    def _send(self, parcel: PendingTransfer) -> None:
        reader, action, now = parcel.reader, parcel.action, self._clock.now
        publisher = self._nodes[action.peer]
        if not self._links.reachable(reader, action.peer):
            return
        if publisher.state == "gone":
            self._fail(parcel, "it has left")
            return
        if not publisher.serves:
            return
        if parcel.manifest is None:
            try:
                parcel.manifest = self._network.ask(action.peer, action.round, action.root)
            except NetworkError as error:
                self._fail(parcel, str(error))
                return
        missing = self._network.missing(reader, parcel.manifest)
        parcel.transfer = self._links.transfer(now, action.peer, reader, missing)
        self._flying[action.peer][reader, action.round, action.root] = parcel
        parcel.due = self._clock.put(parcel.transfer.ends_s, self._end, parcel)

    def _fail(self, parcel: PendingTransfer, reason: str) -> None:
        """The publisher says that it cannot be had."""
        reader, action = parcel.reader, parcel.action
        self.drop(reader, action.peer, action.round, action.root)
        told = self._clock.now + 2 * self._links.latency(reader, action.peer)
        self._post(reader, told, m.FetchFailure(action.peer, action.round, action.root, reason))

    def _end(self, parcel: PendingTransfer) -> None:
        """A transfer has come to its end, well or not."""
        reader, peer, number, root = parcel.reader, parcel.action.peer, parcel.action.round, parcel.action.root
        manifest = parcel.manifest
        arrived = self._land(parcel)
        assert manifest is not None
        fault = "" if arrived else "it was lost on its way"
        if arrived:
            try:
                parcel.source = self._network.receive(reader, manifest)
            except DataError as error:
                fault = str(error)
        if fault:
            self.drop(reader, peer, number, root)
            self._handle(reader, m.FetchFailure(peer, number, root, fault))
            return
        self._emit(events.SnapshotFetched(agent=reader, round=number, peer=peer, snapshot=root, bytes=parcel.sent))
        self._handle(reader, m.SnapshotReady(peer, number, root))

    def _land(self, parcel: PendingTransfer) -> bool:
        """Count what was sent for a parcel that is on its way no more; return whether all of it is there."""
        transfer, manifest, now = parcel.transfer, parcel.manifest, self._clock.now
        assert transfer is not None
        assert manifest is not None
        del self._flying[parcel.action.peer][parcel.reader, parcel.action.round, parcel.action.root]
        parcel.transfer = None
        sent, there = transfer.sent(now), transfer.there(now)
        parcel.sent += sent
        self._network.moved(parcel.reader, parcel.number, manifest, sent, there)
        return transfer.arrives_s is not None and now >= transfer.arrives_s

    def _break_off(self, parcel: PendingTransfer) -> None:
        """End a transfer before its time; those that wait behind it move up."""
        transfer, publisher, now = parcel.transfer, parcel.action.peer, self._clock.now
        if transfer is None:
            return
        self._clock.call_off(parcel.due)
        self._land(parcel)
        # once for all that are broken off at this time
        if transfer.legs and transfer.legs[-1][1] > now and publisher not in self._replanned:
            self._replanned.add(publisher)
            self._clock.put(now, self._replan, publisher)

    def _replan(self, publisher: str) -> None:
        self._replanned.discard(publisher)
        flying = [
            (p, p.transfer, p.transfer.ends_s) for p in self._flying[publisher].values() if p.transfer is not None
        ]
        self._links.replan(self._clock.now, publisher, [transfer for _, transfer, _ in flying])
        for parcel, transfer, ends_s in flying:
            if transfer.ends_s != ends_s:
                self._clock.call_off(parcel.due)
                parcel.due = self._clock.put(transfer.ends_s, self._end, parcel)
