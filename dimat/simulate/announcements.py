"""Carries agents' announcements in virtual time: their offers, and that they leave."""

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

    A message that is lost, or finds its reader down, is not repeated; a connection that is made anew is.
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
        """Let a reader know of a snapshot. `basis`: the manifest's, where it is at hand."""
        publisher = manifest.agent
        arrives = self._links.message(self._clock.now, publisher, reader)
        if arrives is None or self._nodes[reader].machine is None:
            return
        offered = self._network.offered(publisher)
        oldest = offered[0].round if offered else manifest.round
        self._post(reader, arrives, PeerPublished.of(manifest, reader, oldest, basis))

    def connect(self, name: str) -> None:
        """An agent is back, or new: it hears what its peers offer, and its readers what it offers."""
        for peer in sorted(self._nodes[name].plan.peers):
            self._introduce(peer, name)
        for reader in self._readers[name]:
            self._introduce(name, reader)

    def connect_all(self) -> None:
        """All connections are made anew."""
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
        """By agent, those that may ever hear it."""
        readers: dict[str, list[str]] = {name: [] for name in self._nodes}
        for name, node in self._nodes.items():
            for peer in node.plan.peers:
                readers[peer].append(name)
        return readers

    def _introduce(self, publisher: str, reader: str) -> None:
        """Tell a reader what a publisher offers, as whenever a connection is made."""
        if self._nodes[publisher].serves:
            for manifest in self._network.offered(publisher):
                self.tell(manifest, reader)
