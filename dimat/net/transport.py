"""What an agent asks of a network, whatever carries it: offer snapshots, hear what peers offer, get theirs.

The daemon's runner knows these protocols only. `dimat.net.grpc_transport` keeps them over gRPC.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dimat.weights.snapshot import Manifest


@dataclass(frozen=True, slots=True)
class Fetched:
    """A peer's snapshot, whole and checked. `path`: a safetensors file of it in fp32; `bytes`: what crossed the network
    for it, failed attempts too; `signed`: the manifest's bytes and the publisher's signature over them, as received;
    `certificate`: the publisher's (DER), empty on an insecure network."""

    manifest: Manifest
    path: Path
    bytes: int
    signed: tuple[bytes, bytes]
    certificate: bytes = b""


class PeerListener(Protocol):
    """Is told what is heard of peers, in the event loop's thread."""

    def offered(self, manifest: Manifest, oldest: int) -> None:
        """A peer offers a snapshot; told when it is made, and again whenever a connection is made anew. `oldest`: the
        oldest round that the peer still offers."""
        ...

    def lost(self, peer: str, reason: str, last: int) -> None:
        """A peer has left, or has been out of reach for too long. `last`: the last round that it says can still be had
        of it, 0 where it says nothing."""
        ...

    def refused(self, peer: str, reason: str) -> None:
        """A peer is there, and does not fit: another run, architecture, protocol, base, or certificate."""
        ...

    def noticed(self, message: str) -> None:
        """Something that a person should know, said once and then at growing intervals."""
        ...


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Who may fetch from this agent (`readers`), whom it listens to (`peers`), who is on the map (`members`), and
    where they are reached (`addresses`, `host:port`s by agent), as the map says now."""

    peers: Collection[str]
    readers: Collection[str]
    members: Collection[str]
    addresses: Mapping[str, Collection[str]]


class Transport(Protocol):
    """A network, as one agent sees it. All methods belong to the event loop's thread."""

    @property
    def sent_bytes(self) -> Mapping[str, int]:
        """Bytes of snapshots that were sent so far, by reader."""
        ...

    async def start(self, listener: PeerListener) -> None:
        """Listen, and begin to follow the peers. NetworkError where the port cannot be had."""
        ...

    def update_neighbours(self, neighbours: Neighbours) -> None:
        """Take a new map over: follow whoever is new, let go of whoever is not on it any more."""
        ...

    def publish(self, manifest: Manifest) -> None:
        """Offer a recorded snapshot to the readers. Offering it again changes nothing."""
        ...

    async def fetch(self, peer: str, round: int, root: str) -> Fetched:
        """Get a snapshot that a peer offers, and hold it until `release`. Goes on trying while the peer is only out of
        reach, from the blocks that are held, until it is cancelled.

        Raises NetworkError where it cannot be had for good: withdrawn, refused, or other content than was promised.
        """
        ...

    def release(self, peer: str, round: int, root: str) -> None:
        """A snapshot that was fetched is needed no more; it may stay on disk as the base of the peer's next delta."""
        ...

    def leave(self, reason: str) -> None:
        """Tell the readers that this agent leaves; what it offers can be had until `close`."""
        ...

    async def close(self, grace_s: float) -> None:
        """Stop: no new transfers, those that are on their way may end within `grace_s`."""
        ...


Status = Callable[[], Mapping[str, object]]
"""Gives what `dimat status` shows of an agent, as plain values."""
