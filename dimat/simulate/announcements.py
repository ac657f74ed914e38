"""Carries agents' announcements in virtual time: offers of snapshots, and departures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

from dimat.agent.protocol import messages as m
from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.offers import PeerPublished
from dimat.simulate.in_process_network import MemoryNetwork
from dimat.simulate.node import Node
from dimat.simulate.world.clock import Clock
from dimat.simulate.world.link_model import Links
from dimat.weights.snapshot import Manifest


class Announcer:
    """`post(agent, time, event)` hands an agent an event later, in this life.

    A message that is lost, or finds its reader down, is not repeated; a new connection repeats its offers.
    """

    def __init__(
        self,
        clock: Clock,
        network: MemoryNetwork,
        links: Links,
        nodes: Mapping[str, Node],
        post: Callable[[str, float, m.Event], None],
    ) -> None:
        self._clock = clock
        self._network = network
        self._links = links
        self._nodes = nodes
        self._post = post

    def tell(self, manifest: Manifest, reader: str, basis: BasisId | None = None) -> None:
        """Tell a reader of a snapshot. `basis`: the manifest's, if it is at hand."""
        publisher = manifest.agent
        arrives = self._links.message(self._clock.now, publisher, reader)
        if arrives is None or self._nodes[reader].machine is None:
            return
        offered = self._network.offered(publisher)
        oldest = offered[0].round if offered else manifest.round
        self._post(reader, arrives, PeerPublished.of(manifest, reader, oldest, basis))

    def connect(self, name: str) -> None:
        """Connect an agent that is new or back: it hears its peers' offers, and its readers hear its own."""
        for peer in sorted(self._nodes[name].plan.peers):
            self._introduce(peer, name)
        for reader in self._readers[name]:
            self._introduce(name, reader)

    def connect_all(self) -> None:
        """Make all connections anew."""
        for reader, node in self._nodes.items():
            for publisher in sorted(node.plan.peers):
                self._introduce(publisher, reader)

    def farewell(self, name: str, reason: str, last: int) -> None:
        """Tell an agent's readers that it leaves, and the last round that it still offers."""
        lost = m.PeerLost(name, f"it has left ({reason})", last)
        for reader in self._readers[name]:
            arrives = self._links.message(self._clock.now, name, reader)
            if arrives is not None:
                self._post(reader, arrives, lost)

    @cached_property
    def _readers(self) -> Mapping[str, Sequence[str]]:
        """The agents that may ever hear an agent, by its name."""
        readers: dict[str, list[str]] = {name: [] for name in self._nodes}
        for name, node in self._nodes.items():
            for peer in node.plan.peers:
                readers[peer].append(name)
        return readers

    def _introduce(self, publisher: str, reader: str) -> None:
        """Tell a reader of a publisher's offers, as on every new connection."""
        if self._nodes[publisher].serves:
            for manifest in self._network.offered(publisher):
                self.tell(manifest, reader)
