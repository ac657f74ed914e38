"""The interface between an agent and its network: offer, hear of and fetch snapshots.

The daemon's runner knows these protocols only. `dimat.net.grpc_transport` implements them over gRPC.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dimat.weights.snapshot import Manifest


@dataclass(frozen=True, slots=True)
class Fetched:
    """A peer's snapshot, whole and checked.

    `path`: a safetensors file of it in fp32; `bytes`: the traffic that it took, failed attempts included; `signed`: the
    manifest's bytes and the publisher's signature over them, as received; `certificate`: the publisher's (DER), empty
    on an insecure network.
    """

    manifest: Manifest
    path: Path
    bytes: int
    signed: tuple[bytes, bytes]
    certificate: bytes = b""


class PeerListener(Protocol):
    """Receives news of peers; all methods are called in the event loop's thread."""

    def offered(self, manifest: Manifest, oldest: int) -> None:
        """A peer offers a snapshot; called when it is published, and again after each new connection to the peer.

        `oldest`: the oldest round that the peer still offers.
        """
        ...

    def lost(self, peer: str, reason: str, last: int) -> None:
        """A peer has left, or has been out of reach for longer than `Limits.lost_after_s`.

        `last`: the last round that can still be fetched from a peer that has left; 0 where it has not said so.
        """
        ...

    def refused(self, peer: str, reason: str) -> None:
        """A peer answers and does not fit: another run, architecture, protocol, base, or certificate."""
        ...

    def noticed(self, message: str) -> None:
        """A message for a person: passed once, then at growing intervals."""
        ...

    def twin(self, reason: str) -> None:
        """An older process runs under this agent's name at the same time, which is proven: this one is to leave."""
        ...


@dataclass(frozen=True, slots=True)
class Neighbours:
    """An agent's neighbours by the current map.

    `peers`: agents that it fetches from; `readers`: agents that may fetch from it; `members`: all agents of the map;
    `addresses`: their `host:port`s, by agent.
    """

    peers: Collection[str]
    readers: Collection[str]
    members: Collection[str]
    addresses: Mapping[str, Collection[str]]


class Transport(Protocol):
    """One agent's connection to the network. All methods belong to the event loop's thread."""

    @property
    def sent_bytes(self) -> Mapping[str, int]:
        """Bytes of snapshots sent so far, by reader."""
        ...

    async def start(self, listener: PeerListener) -> None:
        """Listen, and begin to follow the peers. NetworkError where the port is taken."""
        ...

    def update_neighbours(self, neighbours: Neighbours) -> None:
        """Take over a new map: follow new peers, and stop following those that are not on it any more."""
        ...

    def publish(self, manifest: Manifest) -> None:
        """Offer a recorded snapshot to the readers. Offering it again changes nothing."""
        ...

    async def fetch(self, peer: str, round: int, root: str) -> Fetched:
        """Fetch a snapshot that a peer offers, and hold it until `release`.

        While the peer is out of reach it tries again, from the blocks that have come, until it is cancelled. Raises
        NetworkError where trying again is of no use: the snapshot was withdrawn or refused, or has other content than
        its manifest promised.
        """
        ...

    def release(self, peer: str, round: int, root: str) -> None:
        """Give up a fetched snapshot; it may stay on disk as the base of the peer's next delta."""
        ...

    def leave(self, reason: str) -> None:
        """Tell the readers that this agent leaves; its snapshots can be fetched until `close`."""
        ...

    async def close(self, grace_s: float) -> None:
        """Stop: take no new transfers, and give those under way `grace_s` to end."""
        ...


Status = Callable[[], Mapping[str, object]]
"""Returns the status of an agent, as plain values, for `dimat status`."""
