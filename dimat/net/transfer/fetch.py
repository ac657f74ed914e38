"""Fetches peers' snapshots the cheapest way: from the cache, encoded, or in full."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

from dimat.errors import DataError, NetworkError
from dimat.net.limits import SLOT_S, Limits
from dimat.net.manifest import SignedManifest
from dimat.net.peers.link import PeerLink
from dimat.net.threads import Threads
from dimat.net.throttle import Turns
from dimat.net.transfer.cache import SnapshotCache
from dimat.net.transfer.download import DownloadStats, GoneError, download
from dimat.net.transfer.received_blocks import ReceivedBlocks
from dimat.net.transport import Fetched
from dimat.weights.durable import write_bytes
from dimat.weights.encodings import decode_weights
from dimat.weights.snapshot import Form, Manifest, Payload, SnapshotStore, checksum
from dimat.weights.tensors import encode

Sources = Callable[[], Sequence[Payload]]


class Fetcher:
    """Fetches snapshots into `cache`.

    `own`: this agent's store, and `offered` returns the payloads in it: content that is already here is not sent again.
    `encodings`: those that can be decoded here. `bytes`: payload received, by peer and encoding; `retries`: download
    attempts after the first, by peer.
    """

    def __init__(
        self,
        cache: SnapshotCache,
        own: SnapshotStore,
        offered: Sources,
        encodings: Sequence[str],
        limits: Limits,
        threads: Threads,
        generator: Random,
        noticed: Callable[[str], None],
    ) -> None:
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.retries: Counter[str] = Counter()
        self._cache = cache
        self._own = own
        self._offered = offered
        self._encodings = encodings
        self._limits = limits
        self._threads = threads
        self._generator = generator
        self._noticed = noticed
        self._turns = Turns(limits.fetches, SLOT_S)
        self._locks: dict[tuple[str, str], tuple[asyncio.Lock, list[None]]] = {}

    async def fetch(self, find: Callable[[], PeerLink], peer: str, round_: int, root: str) -> Fetched:
        """Fetch a snapshot and hold it; NetworkError if it cannot be fetched. `find` returns the peer's link."""
        stats = DownloadStats(self.bytes, self.retries)
        try:
            # alone, as two rounds may have equal content
            async with self._alone(peer, root):
                with self._cache.pinned(root):
                    signed = self._cache.find(peer, round_, root)
                    if signed is None or not await self._held(root):
                        signed = await self._offer(find(), round_, root)
                        if not await self._held(root):
                            await self._transfer(find(), signed, stats)
                        await self._threads.submit(self._cache.write_manifest, signed)
                    self._cache.keep(peer, signed)
        except (DataError, OSError) as error:
            raise NetworkError(f"snapshot {root[:12]}… of {peer}, round {round_}, cannot be stored: {error}") from error
        except NetworkError:
            raise
        except Exception as error:  # a fault in one fetch is that fetch's failure, never the agent's
            fault = f"{type(error).__name__}: {error}"
            raise NetworkError(f"fetching snapshot {root[:12]}… of {peer}, round {round_}, failed: {fault}") from error
        return Fetched(signed.manifest, self._cache.path(root), stats.bytes, (signed.data, signed.signature))

    @asynccontextmanager
    async def _alone(self, peer: str, root: str) -> AsyncGenerator[None]:
        """Wait until no other fetch of the same snapshot from the same peer is running."""
        lock, users = self._locks.setdefault((peer, root), (asyncio.Lock(), []))
        users.append(None)
        try:
            async with lock:
                yield
        finally:
            users.pop()
            if not users:
                del self._locks[peer, root]

    async def _offer(self, link: PeerLink, round_: int, root: str) -> SignedManifest:
        await link.connection()
        signed = link.offer(round_, root)
        if signed is None:
            raise NetworkError(f"{link.peer} does not offer snapshot {root[:12]}… of round {round_}, or no longer does")
        return signed

    async def _held(self, root: str) -> bool:
        """Return whether a snapshot is in the cache, complete and undamaged."""
        return await self._threads.submit(self._cache.verify, root)

    async def _transfer(self, link: PeerLink, signed: SignedManifest, stats: DownloadStats) -> None:
        manifest = signed.manifest
        payload = manifest.payload
        if any(known.root == payload.root for known in self._offered()):
            self._cache.make_room(link.peer, payload)
            if await self._threads.submit(self._cache.link, self._own.path(payload.root), payload):
                return
        for form in await self._forms(manifest):
            try:
                await self._by_form(link, form, payload, stats)
                return
            except (DataError, GoneError) as error:
                self._noticed(
                    f"the {form.encoding} form of snapshot {payload.root[:12]}… of {link.peer} is of no use, it is "
                    f"fetched whole: {error}"
                )
        await self._whole(link, payload, stats)

    async def _forms(self, manifest: Manifest) -> list[Form]:
        """Return the forms that take fewer bytes than the payload and can be decoded here, the cheapest first."""
        forms = [form for form in manifest.forms if form.encoding in self._encodings]
        usable = [form for form in forms if not form.after or await self._base(form.after) is not None]
        if not usable:
            return []
        return await self._threads.submit(_cheaper, manifest.payload, usable, self._sources(manifest.payload.root))

    async def _base(self, root: str) -> Path | None:
        """Return the file of the snapshot to which a delta was taken; None if it is not here."""
        if await self._held(root):
            return self._cache.path(root)
        return self._own.path(root) if any(known.root == root for known in self._offered()) else None

    def _sources(self, but: str) -> list[tuple[Path, Payload]]:
        own = [(self._own.path(known.root), known) for known in self._offered()]
        return self._cache.sources(but) + own

    async def _whole(self, link: PeerLink, payload: Payload, stats: DownloadStats) -> None:
        self._cache.make_room(link.peer, payload)
        stats.encoding = "fp32"
        received = await self._open(link, payload)
        try:
            await self._download(link, payload, received, stats)
            await self._threads.submit(self._cache.finish, link.peer, received, payload.root)
        except GoneError:
            self._cache.drop(link.peer, payload.root)
            raise
        finally:
            self._cache.end(link.peer, received, payload.root)

    async def _by_form(self, link: PeerLink, form: Form, payload: Payload, stats: DownloadStats) -> None:
        """Download a form and decode the snapshot from it; DataError if it decodes to another one."""
        self._cache.make_room(link.peer, form.payload, payload.bytes)
        stats.encoding = form.encoding
        received = await self._open(link, form.payload)
        root = form.payload.root
        try:
            await self._download(link, form.payload, received, stats)
            path = await self._threads.submit(self._cache.finish, link.peer, received, root)
            after = await self._base(form.after) if form.after else None
            if form.after and after is None:
                raise DataError(f"its base {form.after[:12]}… is gone")
            await self._threads.submit(self._decode, path, after, payload)
        except (DataError, GoneError):
            self._cache.drop(link.peer, root)
            raise
        finally:
            self._cache.end(link.peer, received, root)
        self._cache.drop(link.peer, root)

    def _decode(self, path: Path, after: Path | None, payload: Payload) -> None:
        data = encode(decode_weights(path, after=after))
        made = checksum(data, payload.block_bytes)
        if made.root != payload.root:
            raise DataError(f"it decodes to snapshot {made.root[:12]}…")
        write_bytes(self._cache.path(payload.root), data)

    async def _open(self, link: PeerLink, payload: Payload) -> ReceivedBlocks:
        """Open an incoming payload, with all of its blocks that are already here."""
        opening = self._threads.submit(self._cache.begin, link.peer, payload)

        def end(opened: asyncio.Future[ReceivedBlocks]) -> None:
            if opened.exception() is None:
                self._cache.end(link.peer, opened.result(), payload.root)

        try:
            received = await asyncio.shield(opening)
            await self._threads.submit(received.fill, self._sources(payload.root))
        except BaseException:
            opening.add_done_callback(end)  # called off: it is closed as soon as it is open
            raise
        return received

    async def _download(self, link: PeerLink, payload: Payload, received: ReceivedBlocks, stats: DownloadStats) -> None:
        await download(
            link,
            payload,
            received,
            stats,
            limits=self._limits,
            turns=self._turns,
            threads=self._threads,
            generator=self._generator,
        )


def _cheaper(payload: Payload, forms: Sequence[Form], sources: Sequence[tuple[Path, Payload]]) -> list[Form]:
    """Return the forms with fewer missing bytes than the payload, the cheapest first."""
    held = {digest for _, known in sources for digest in known.blocks}
    whole = _missing(payload, held)
    costs = [(_missing(form.payload, held), number, form) for number, form in enumerate(forms)]
    return [form for cost, _, form in sorted(costs, key=lambda way: way[:2]) if cost < whole]


def _missing(payload: Payload, held: set[str]) -> int:
    """Return the bytes of a payload whose blocks are not among the hashes `held`."""
    # by hash: blocks of equal content come once
    lengths = {
        digest: min(payload.block_bytes, payload.bytes - index * payload.block_bytes)
        for index, digest in enumerate(payload.blocks)
    }
    return sum(length for digest, length in lengths.items() if digest not in held)
