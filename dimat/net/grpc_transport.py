"""The transport over gRPC: one agent's server, links, downloads and uploads."""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random

from dimat.errors import NetworkError
from dimat.net.compatibility import Profile
from dimat.net.grpc_server import GrpcServer
from dimat.net.limits import FREED_KEPT_BYTES, MAPPED_BYTES, SERVED_CHECK_S, Limits
from dimat.net.manifest import ManifestLimits, Sign
from dimat.net.peers.connection import Connector, Metadata
from dimat.net.peers.link import AddressLookup, PeerLink
from dimat.net.peers.lives import Lives, OwnLife, header_of
from dimat.net.pki.certificates import check_certificate, check_signature
from dimat.net.pki.identity import Identity
from dimat.net.threads import BackgroundTasks, InFlight, Threads
from dimat.net.transfer.cache import SnapshotCache
from dimat.net.transfer.fetch import Fetcher
from dimat.net.transfer.outbox import Outbox
from dimat.net.transfer.upload import Uploader
from dimat.net.transport import Fetched, Neighbours, PeerListener, Status
from dimat.weights.snapshot import Manifest, SnapshotStore, roots_of
from dimat.wire import TWIN_HEADER, TWINS_HEADER


class GrpcTransport:
    """The transport of `agent` in the network of `run`.

    `identity`: its keys; None makes an insecure network, on loopback only, where names are not proven. `store`: its own
    snapshots, offered again after a restart; payloads of forms are in the store's folder under their address, too.
    `received`: the folder of fetched snapshots. `manifest_limits`: the most that a manifest may claim. `listen`:
    `host:port`, port 0 chooses a free one, see `port`. `generator`: draws the jitter of waits. `status`: returns the
    answer to `Status`. `address_lookup`: returns further addresses of a peer, beside those on the map. `durable`:
    received files survive power loss.
    """

    def __init__(
        self,
        *,
        run: str,
        agent: str,
        identity: Identity | None,
        store: SnapshotStore,
        received: Path,
        profile: Profile,
        manifest_limits: ManifestLimits,
        listen: str,
        generator: Random,
        limits: Limits,
        status: Status = dict,
        address_lookup: AddressLookup | None = None,
        durable: bool = True,
    ) -> None:
        self._run = run
        self._agent = agent
        self._identity = identity
        self._store = store
        self._folder = received
        self._profile = profile
        self._manifest_limits = manifest_limits
        self._listen = listen
        self._generator = generator
        self._limits = limits
        self._status = status
        self._address_lookup = address_lookup
        self._durable = durable
        self._threads = Threads()
        self._outbox = Outbox(store, run, agent, self._signer(), self._threads)
        self._uploader = Uploader(self._limits, self._threads)
        self._life = OwnLife(run, agent, self._signer(), self._own_check)
        self._lives = Lives(self._notice)
        self._connector = Connector(
            run, agent, identity, profile, manifest_limits, self._limits, self._life.header, self._hear
        )
        self._links: dict[str, PeerLink] = {}
        self._neighbours = Neighbours((), (), (), {})
        self._fetches = InFlight()
        self._tasks = BackgroundTasks()
        self._listener: PeerListener | None = None
        self._server: GrpcServer | None = None
        self._cache: SnapshotCache | None = None
        self._fetcher: Fetcher | None = None
        self._port = 0
        self._most_members = 0

    # ── for the daemon and its tools ──────────────────────────────────────────────────────────────────────────
    @property
    def port(self) -> int:
        """The port that the server listens on, after `start`."""
        return self._port

    @property
    def sent_bytes(self) -> Mapping[str, int]:
        """Bytes of payload sent, by reader."""
        return _by_peer(self._uploader.sent)

    @property
    def received_bytes(self) -> Mapping[str, int]:
        """Bytes of payload received, by peer, failed attempts included."""
        return {} if self._fetcher is None else _by_peer(self._fetcher.bytes)

    @property
    def traffic(self) -> list[tuple[str, str, str, int]]:
        """Bytes of payload since the start, as rows of direction ("sent" or "received"), peer, encoding, bytes."""
        received = {} if self._fetcher is None else self._fetcher.bytes
        ways = (("sent", self._uploader.sent), ("received", received))
        return [(way, *key, count) for way, counts in ways for key, count in sorted(counts.items())]

    @property
    def retries(self) -> Mapping[str, int]:
        """Download attempts since the start, beyond the first of each payload, by peer."""
        return {} if self._fetcher is None else dict(self._fetcher.retries)

    @property
    def peers(self) -> Mapping[str, Mapping[str, object]]:
        """State of each peer's link, with bytes of payload sent and received since the start, for `dimat status`."""
        sent, received = self.sent_bytes, self.received_bytes
        return {
            peer: {**link.state, "sent_bytes": sent.get(peer, 0), "received_bytes": received.get(peer, 0)}
            for peer, link in sorted(self._links.items())
        }

    # ── the interface of Transport ────────────────────────────────────────────────────────────────────────────
    async def start(self, listener: PeerListener) -> None:
        """Listen, offer the snapshots from before a restart again, and begin to follow the peers.

        NetworkError if the port is in use, SecurityError if an insecure network would be open to other machines,
        DataError if the folder cannot be used.
        """
        self._listener = listener
        keep_freed()
        cache = await self._threads.submit(self._open_cache)
        self._cache = cache
        self._fetcher = Fetcher(
            cache,
            self._store,
            self._outbox.payloads,
            self._profile.encodings,
            self._limits,
            self._threads,
            self._generator,
            listener.noticed,
        )
        self._outbox.restore(self._own_check, self._manifest_limits, listener.noticed)
        self._server = GrpcServer(
            run=self._run,
            agent=self._agent,
            identity=self._identity,
            profile=self._profile,
            outbox=self._outbox,
            uploader=self._uploader,
            store=self._store,
            limits=self._limits,
            status=self._status,
            heard=self._heard,
            noticed=listener.noticed,
            lives=self._lives,
        )
        self._port = await self._server.start(self._listen)
        await self._tasks.open()
        self._tasks.start(self._outbox.write_manifests(listener.noticed), "writing manifests")
        self.update_neighbours(self._neighbours)

    def update_neighbours(self, neighbours: Neighbours) -> None:
        """Switch to a new map: follow new peers, and stop following those that are no longer on it."""
        self._neighbours = neighbours
        if self._server is None or self._listener is None or not self._tasks.is_open:
            return  # `start` does it, and after `close` nobody is followed
        self._server.neighbours = neighbours
        # a peer may go by an older map for a while, so the number of members only grows
        members = len({*neighbours.members, self._agent})
        self._most_members = max(self._most_members, members)
        limits = replace(self._manifest_limits, members=self._most_members)
        for peer in [peer for peer in self._links if peer not in neighbours.peers]:
            self._tasks.start(self._links.pop(peer).stop(), f"end of the link to {peer}")
        for peer in sorted(neighbours.peers):
            addresses = list(neighbours.addresses.get(peer, ()))
            link = self._links.get(peer)
            if link is not None:
                link.manifest_limits = limits
                link.update_addresses(addresses)
                continue
            link = self._links[peer] = PeerLink(
                peer,
                run=self._run,
                connector=self._connector,
                profile=self._profile,
                manifest_limits=limits,
                limits=self._limits,
                generator=self._generator,
                listener=self._listener,
                address_lookup=self._address_lookup,
                threads=self._threads,
            )
            link.update_addresses(addresses)
            link.start(self._tasks)

    def sign_again(self) -> None:
        """Sign the offered manifests with the agent's new key; connections stay open."""
        self._outbox.sign_again()

    def publish(self, manifest: Manifest) -> None:
        """Offer a recorded snapshot to the readers. Offering it again changes nothing."""
        self._outbox.publish(manifest)

    async def fetch(self, peer: str, round: int, root: str) -> Fetched:
        """Fetch a snapshot that a peer offers, and hold it until `release`; see `Transport.fetch`."""
        if self._fetcher is None:
            raise NetworkError("the network is not started")
        with self._fetches.one():
            fetched = await self._fetcher.fetch(lambda: self._link(peer), peer, round, root)
            link = self._links.get(peer)  # gone, where it left the map meanwhile
            return fetched if link is None else replace(fetched, certificate=link.certificate)

    def release(self, peer: str, round: int, root: str) -> None:
        """Give up a fetched snapshot."""
        if self._cache is not None:
            self._cache.release(peer, round, root)

    async def unfollow_all(self) -> None:
        """Stop following all peers; this agent's snapshots can still be fetched."""
        links = list(self._links.values())
        self._links.clear()
        await asyncio.gather(*(link.stop() for link in links))

    async def served(self, readers: Collection[str]) -> None:
        """Wait until each of these readers has received the newest snapshot, or is gone."""
        offered = self._store.offered(self._agent)
        roots = roots_of(offered[-1]) if offered else ()
        server = self._server
        # by the clock: no event tells that a reader makes no more calls
        while server is not None and roots and any(server.waiting(reader, roots) for reader in readers):  # noqa: ASYNC110
            await asyncio.sleep(SERVED_CHECK_S)

    def leave(self, reason: str) -> None:
        """Tell the readers that this agent leaves."""
        self._outbox.leave(reason)

    async def close(self, grace_s: float) -> None:
        """Stop: accept no new transfers, and give current ones `grace_s` to end."""
        await self.unfollow_all()
        if self._server is not None:
            await self._server.close(grace_s)
        # their links are gone, so the fetches end, and their work in threads ends before they do
        with suppress(TimeoutError):
            async with asyncio.timeout(self._limits.call_s):
                await self._fetches.none()
        self._outbox.close()
        await self._tasks.close()
        self._threads.close()

    # ── internals ─────────────────────────────────────────────────────────────────────────────────────────────
    def _open_cache(self) -> SnapshotCache:
        limits = self._limits
        return SnapshotCache(
            self._folder,
            limits.disk_bytes,
            limits.disk_reserve_bytes,
            self._run,
            self._manifest_limits,
            self._threads,
            durable=self._durable,
        )

    def _link(self, peer: str) -> PeerLink:
        link = self._links.get(peer)
        if link is None:
            raise NetworkError(f"{peer} is not a neighbour that {self._agent} fetches from")
        return link

    def _heard(self, agent: str) -> None:
        """Connect at once to a member that has said hello to this agent."""
        link = self._links.get(agent)
        if link is not None:
            link.wake()

    def _signer(self) -> Sign:
        return _unsigned if self._identity is None else self._identity.sign

    def _own_check(self, data: bytes, signature: bytes) -> None:
        """Check a signature of this agent itself: from before a restart, or of another process."""
        identity = self._identity
        if identity is not None:  # on an insecure network nothing is checked
            key = check_certificate(identity.certificate_der, identity.ca, identity.name)
            check_signature(key, data, signature)

    def _hear(self, peer: str, metadata: Metadata) -> None:
        """Read the metadata of a peer's answers: about an older process of this agent's name, and about others'
        twins."""
        older = self._life.proven_older(header_of(metadata, TWIN_HEADER))
        if older is not None and self._listener is not None:
            began = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(older.started_s))
            self._listener.twin(
                f"another process runs as {self._agent}, since {began} UTC, and {peer} hears both: this one, which is "
                "younger, leaves; stop the other one first if this one is to run"
            )
        self._lives.take_word(peer, header_of(metadata, TWINS_HEADER), self._neighbours.members)

    def _notice(self, message: str) -> None:
        if self._listener is not None:
            self._listener.noticed(message)


def _by_peer(counts: Mapping[tuple[str, str], int]) -> dict[str, int]:
    """Return counts by peer and encoding as counts by peer."""
    total: dict[str, int] = {}
    for (peer, _), count in counts.items():
        total[peer] = total.get(peer, 0) + count
    return total


def _unsigned(data: bytes) -> bytes:
    """Nothing is signed on an insecure network."""
    return b""


# ── memory of the process ─────────────────────────────────────────────────────────────────────────────────────
CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
# parameters of glibc's mallopt (malloc.h)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed() -> bool:
    """Let glibc keep up to `FREED_KEPT_BYTES` of freed memory per arena; return whether it was set.

    Left to itself, glibc trims an arena as soon as about two chunks are free at its top. A transfer allocates and frees
    each chunk at every hand-over, so it would pay a page fault for every 4 KiB that it moves. Nothing is set if the C
    library is another one, or if the environment sets the thresholds.
    """
    if any(name in os.environ for name in CHOSEN) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no glibc: musl, macOS, Windows
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES) and mallopt(M_TRIM_THRESHOLD, FREED_KEPT_BYTES))
