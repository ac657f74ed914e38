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

    A transfer that breaks off, or finds its publisher down or cut off, waits until it is back (`retry`), and then goes
    on with what is missing; the reader's deadline bounds that. Bytes are counted when a transfer ends, as many as were
    sent until then, however it ends.
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
        self._pending: defaultdict[str, dict[tuple[str, int, str], PendingTransfer]] = defaultdict(dict)
        # by publisher what is on its way from it, in the order in which it was asked for
        self._flying: defaultdict[str, dict[tuple[str, int, str], PendingTransfer]] = defaultdict(dict)
        self._replanned: set[str] = set()

    def fetch(self, reader: str, number: int, action: m.Fetch) -> None:
        """Bring a snapshot for the reader's round `number`."""
        key = action.peer, action.round, action.root
        self.drop(reader, *key)
        pending = self._pending[reader][key] = PendingTransfer(reader, number, action)
        self._send(pending)

    def retry(self) -> None:
        """Go on with what waits for a publisher, where that can be reached by now."""
        for of_reader in self._pending.values():
            for pending in list(of_reader.values()):
                if pending.source is None and pending.transfer is None:
                    self._send(pending)

    def source(self, reader: str, peer: str, root: str) -> Any:
        """Return a snapshot that is there, of whatever round it has this content."""
        held = self._pending[reader].items()
        return next(p.source for (of, _, what), p in held if (of, what) == (peer, root) and p.source is not None)

    def drop(self, reader: str, peer: str, number: int, root: str) -> None:
        """Let go of a snapshot of round `number`, there or on its way."""
        pending = self._pending[reader].pop((peer, number, root), None)
        if pending is None:
            return
        self._break_off(pending)
        if pending.manifest is not None:
            self._network.release(root)

    def drop_all(self, reader: str) -> None:
        """Let go of all that a reader has or awaits."""
        for key in list(self._pending[reader]):
            self.drop(reader, *key)

    def break_off(self, hit: Callable[[str, str], bool]) -> None:
        """Break off what is on its way between (reader, publisher) pairs that are hit."""
        for publisher, flying in self._flying.items():
            for pending in list(flying.values()):
                if hit(pending.reader, publisher):
                    self._break_off(pending)

    # ── on its way ───────────────────────────────────────────────────────────────────────────────────────────
    def _send(self, pending: PendingTransfer) -> None:
        reader, action, now = pending.reader, pending.action, self._clock.now
        publisher = self._nodes[action.peer]
        if not self._links.reachable(reader, action.peer):
            return
        if publisher.state == "gone":
            self._fail(pending, "it has left")
            return
        if not publisher.serves:
            return
        if pending.manifest is None:
            try:
                pending.manifest = self._network.ask(action.peer, action.round, action.root)
            except NetworkError as error:
                self._fail(pending, str(error))
                return
        missing = self._network.missing(reader, pending.manifest)
        pending.transfer = self._links.transfer(now, action.peer, reader, missing)
        self._flying[action.peer][reader, action.round, action.root] = pending
        pending.due = self._clock.put(pending.transfer.ends_s, self._end, pending)

    def _fail(self, pending: PendingTransfer, reason: str) -> None:
        """The publisher says that it cannot be had."""
        reader, action = pending.reader, pending.action
        self.drop(reader, action.peer, action.round, action.root)
        told = self._clock.now + 2 * self._links.latency(reader, action.peer)
        self._post(reader, told, m.FetchFailure(action.peer, action.round, action.root, reason))

    def _end(self, pending: PendingTransfer) -> None:
        """A transfer has come to its end, well or not."""
        reader, peer, number, root = pending.reader, pending.action.peer, pending.action.round, pending.action.root
        manifest = pending.manifest
        arrived = self._land(pending)
        assert manifest is not None
        fault = "" if arrived else "it was lost on its way"
        if arrived:
            try:
                pending.source = self._network.receive(reader, manifest)
            except DataError as error:
                fault = str(error)
        if fault:
            self.drop(reader, peer, number, root)
            self._handle(reader, m.FetchFailure(peer, number, root, fault))
            return
        self._emit(events.SnapshotFetched(agent=reader, round=number, peer=peer, snapshot=root, bytes=pending.sent))
        self._handle(reader, m.SnapshotReady(peer, number, root))

    def _land(self, pending: PendingTransfer) -> bool:
        """Count what was sent for a transfer that is on its way no more; return whether all of it is there."""
        transfer, manifest, now = pending.transfer, pending.manifest, self._clock.now
        assert transfer is not None
        assert manifest is not None
        del self._flying[pending.action.peer][pending.reader, pending.action.round, pending.action.root]
        pending.transfer = None
        sent, there = transfer.sent(now), transfer.there(now)
        pending.sent += sent
        self._network.moved(pending.reader, pending.number, manifest, sent, there)
        return transfer.arrives_s is not None and now >= transfer.arrives_s

    def _break_off(self, pending: PendingTransfer) -> None:
        """End a transfer before its time; those that wait behind it move up."""
        transfer, publisher, now = pending.transfer, pending.action.peer, self._clock.now
        if transfer is None:
            return
        self._clock.call_off(pending.due)
        self._land(pending)
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
        for pending, transfer, ends_s in flying:
            if transfer.ends_s != ends_s:
                self._clock.call_off(pending.due)
                pending.due = self._clock.put(transfer.ends_s, self._end, pending)
