"""The interface between an agent and its network: offer, learn of and fetch snapshots.

The daemon's runner uses only these protocols. `dimat.net.grpc_transport` implements them over gRPC.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dimat.weights.snapshot import Manifest


@dataclass(frozen=True, slots=True)
class Fetched:
    """A peer's snapshot, complete and checked.

    `path`: a safetensors file of it in fp32; `bytes`: the traffic for it, failed attempts included; `signed`: the
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

        `last`: the last round that can still be fetched from a peer that has left; 0 if it did not say that it leaves.
        """
        ...

    def refused(self, peer: str, reason: str) -> None:
        """A peer answers but is incompatible: another run, architecture, protocol, base, or certificate."""
        ...

    def noticed(self, message: str) -> None:
        """A message for the operator: passed once, then at growing intervals."""
        ...

    def twin(self, reason: str) -> None:
        """An older process is proven to run under this agent's name at the same time: this one must leave."""
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
        """Listen, and begin to follow the peers. NetworkError if the port is in use."""
        ...

    def update_neighbours(self, neighbours: Neighbours) -> None:
        """Switch to a new map: follow new peers, and stop following those that are no longer on it."""
        ...

    def publish(self, manifest: Manifest) -> None:
        """Offer a recorded snapshot to the readers. Offering it again changes nothing."""
        ...

    async def fetch(self, peer: str, round: int, root: str) -> Fetched:
        """Fetch a snapshot that a peer offers, and hold it until `release`.

        While the peer is out of reach it tries again, keeping the blocks that have arrived, until it is cancelled.
        Raises NetworkError if trying again is of no use: the snapshot was withdrawn or refused, or has other content
        than its manifest promised.
        """
        ...

    def release(self, peer: str, round: int, root: str) -> None:
        """Give up a fetched snapshot; it may stay on disk as the base of the peer's next delta."""
        ...

    def leave(self, reason: str) -> None:
        """Tell the readers that this agent leaves; its snapshots can be fetched until `close`."""
        ...

    async def close(self, grace_s: float) -> None:
        """Stop: accept no new transfers, and give current ones `grace_s` to end."""
        ...


Status = Callable[[], Mapping[str, object]]
"""Returns the status of an agent, as plain values, for `dimat status`."""
