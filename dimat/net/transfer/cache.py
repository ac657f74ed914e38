"""The disk cache of peers' snapshots: complete ones, parts of incoming ones, a quota.

A snapshot is kept while it is in use; the last one of each peer is kept longer, as the base of the peer's next delta
and for the blocks that the next one shares with it. Equal snapshots have one address and are stored once.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from dimat.errors import DataError, DimatError
from dimat.net.limits import STALE_PART_S
from dimat.net.manifest import ManifestLimits, SignedManifest, read_signed, unseal, write_signed
from dimat.net.threads import Threads
from dimat.net.transfer.received_blocks import ReceivedBlocks
from dimat.weights.snapshot import Payload, make_folder, verify_file
from dimat.wire.v1 import peer_pb2 as pb


@dataclass(slots=True)
class _Entry:
    """A complete snapshot.

    `signed`: manifests by (peer, round); `holds`: number of uses by (peer, round); `checked`: its content was read and
    verified since this agent started; `used`: grows with use, for the quota.
    """

    payload: Payload
    signed: dict[tuple[str, int], SignedManifest] = field(default_factory=dict[tuple[str, int], SignedManifest])
    holds: Counter[tuple[str, int]] = field(default_factory=Counter[tuple[str, int]])
    checked: bool = False
    used: int = 0


class SnapshotCache:
    """Received snapshots in `folder`, which holds nothing else.

    `quota_bytes`: disk space that they may take; beyond it the oldest that are not in use are removed first;
    `reserve_bytes`: disk space that stays free.

    The event loop keeps, releases and drops, while threads verify, begin, finish and link: one lock guards the records,
    and is never held while a payload is read, written or hashed.
    """

    def __init__(
        self,
        folder: Path,
        quota_bytes: int,
        reserve_bytes: int,
        run: str,
        manifest_limits: ManifestLimits,
        threads: Threads,
        *,
        durable: bool = True,
    ) -> None:
        self._threads = threads
        self.folder = folder
        self._quota_bytes = quota_bytes
        self._reserve_bytes = reserve_bytes
        self._run = run
        self._manifest_limits = manifest_limits
        self._durable = durable
        self._entries: dict[str, _Entry] = {}
        self._latest: dict[str, tuple[int, str]] = {}
        # incoming payloads by peer and root, those of broken attempts too; and how many fetches work on each
        self._coming: dict[tuple[str, str], Payload] = {}
        self._open: Counter[tuple[str, str]] = Counter()
        self._pinned: Counter[str] = Counter()  # by root, the fetches that are about to hold it
        self._clock = 0
        self._lock = threading.RLock()
        make_folder(folder)
        self._clean()

    # ── whole snapshots ───────────────────────────────────────────────────────────────────────────────────────
    def path(self, root: str) -> Path:
        """Return the path of a complete snapshot with this address, whether it exists or not."""
        return self.folder / f"{root}.safetensors"

    def payload(self, root: str) -> Payload | None:
        """Return the payload of a complete snapshot; None if it is not there."""
        with self._lock:
            entry = self._entries.get(root)
            return None if entry is None else entry.payload

    def find(self, peer: str, round_: int, root: str) -> SignedManifest | None:
        """Return a peer's signed manifest of a complete snapshot; None if it is not there."""
        with self._lock:
            entry = self._entries.get(root)
            return None if entry is None else entry.signed.get((peer, round_))

    def sources(self, but: str) -> list[tuple[Path, Payload]]:
        """Return the files whose blocks another snapshot may share, the most recently used first."""
        with self._lock:
            entries = sorted(self._entries.items(), key=lambda item: -item[1].used)
        return [(self.path(root), entry.payload) for root, entry in entries if root != but]

    def verify(self, root: str) -> bool:
        """Return whether a snapshot is present and undamaged; it is read once a run, and removed if damaged."""
        with self._lock:
            entry = self._entries.get(root)
        if entry is None:
            return False
        if not entry.checked:
            try:
                verify_file(self.path(root), entry.payload)
            except DataError:
                with self._lock:
                    # it may have gone, and come anew, while it was read
                    if self._entries.get(root) is entry:
                        del self._entries[root]
                        self.path(root).unlink(missing_ok=True)
                        self._manifest_path(root).unlink(missing_ok=True)
                return False
            entry.checked = True
        with self._lock:
            return self._entries.get(root) is entry

    @contextmanager
    def pinned(self, root: str) -> Generator[None]:
        """Keep a snapshot while a fetch is about to hold it, even if others need the space."""
        with self._lock:
            self._pinned[root] += 1
        try:
            yield
        finally:
            with self._lock:
                self._pinned[root] -= 1
                if not self._pinned[root]:
                    del self._pinned[root]

    # ── incoming payloads ─────────────────────────────────────────────────────────────────────────────────────
    def make_room(self, peer: str, payload: Payload, more: int = 0) -> None:
        """Make room in the quota for a payload and `more` bytes; DataError if snapshots in use leave too little."""
        with self._lock:
            taken = self._free(peer, payload.root, payload.bytes + more)
        amount = payload.bytes + more
        if taken + amount > self._quota_bytes:
            raise DataError(
                f"no room for a snapshot of {amount:,} bytes in {self.folder}: {taken:,} bytes are needed now, the "
                f"quota is {self._quota_bytes:,}; raise disk_bytes"
            )

    def _free(self, peer: str, root: str, amount: int) -> int:
        """Remove the oldest that are not in use until `amount` bytes fit; return the bytes that the others take."""
        coming = {key: payload.bytes for key, payload in self._coming.items() if key != (peer, root)}
        taken = sum(entry.payload.bytes for entry in self._entries.values()) + sum(coming.values())
        for key in [key for key in coming if not self._open[key]]:
            if taken + amount <= self._quota_bytes:
                return taken
            taken -= coming[key]
            self.drop(*key)
        for held in sorted(self._entries, key=lambda held: self._entries[held].used):
            if taken + amount <= self._quota_bytes:
                return taken
            entry = self._entries[held]
            if not entry.holds and not self._pinned[held]:
                taken -= entry.payload.bytes
                self._remove(held)
        return taken

    def begin(self, peer: str, payload: Payload) -> ReceivedBlocks:
        """Open an incoming payload, with the blocks from an earlier attempt; to be closed by `end`."""
        part, whole = self.part_path(peer, payload.root), self.path(payload.root)
        key = peer, payload.root
        with self._lock:
            if payload.root not in self._entries and whole.exists() and self._pinned[payload.root] < 2:
                whole.replace(part)  # an attempt was called off when the file had just got its name
            self._coming[key] = payload
            self._open[key] += 1
        try:
            return ReceivedBlocks(part, payload, self._reserve_bytes)
        except BaseException:
            with self._lock:
                self._close(key)
                self._coming.pop(key, None)
            raise

    def end(self, peer: str, received: ReceivedBlocks, root: str) -> None:
        """Close a payload that `begin` has opened; an incomplete one is left for another attempt."""
        with self._lock:
            self._close((peer, root))
        self._threads.submit(received.close)

    def _close(self, key: tuple[str, str]) -> None:
        self._open[key] -= 1
        if not self._open[key]:
            del self._open[key]

    def part_path(self, peer: str, root: str) -> Path:
        """Return the path of a payload while it arrives from a peer."""
        return self.folder / f"{root}.{blake3(peer.encode()).hexdigest()[:16]}.part"

    def finish(self, peer: str, received: ReceivedBlocks, root: str) -> Path:
        """Rename a complete payload to its path, and return that."""
        path = self.path(root)
        received.finish(path, durable=self._durable)
        with self._lock:
            self._coming.pop((peer, root), None)
        return path

    def link(self, source: Path, payload: Payload) -> bool:
        """Link (else copy) a payload from another folder; False if it is not there or damaged."""
        path = self.path(payload.root)
        temporary = path.with_suffix(f".{self._tick()}.link")
        try:
            try:
                os.link(source, temporary)
            except FileNotFoundError:
                return False
            except OSError:
                shutil.copyfile(source, temporary)  # another disk, or one without links
            verify_file(temporary, payload)
            temporary.replace(path)
        except (OSError, DataError):
            temporary.unlink(missing_ok=True)
            return False
        return True

    def drop(self, peer: str, root: str) -> None:
        """Remove an incoming payload, and the complete payload if it is not that of a snapshot."""
        with self._lock:
            self._coming.pop((peer, root), None)
            self._discard(self.part_path(peer, root))
            if root not in self._entries and not self._pinned[root]:
                self._discard(self.path(root))

    def write_manifest(self, signed: SignedManifest) -> None:
        """Write a manifest beside its snapshot, for this agent's next run."""
        write_signed(self._manifest_path(signed.manifest.payload.root), signed, durable=self._durable)

    # ── use ───────────────────────────────────────────────────────────────────────────────────────────────────
    def keep(self, peer: str, signed: SignedManifest) -> None:
        """Hold a complete snapshot until `release`; it becomes the last one of its peer if its round is the highest."""
        with self._lock:
            manifest = signed.manifest
            root, round_ = manifest.payload.root, manifest.round
            entry = self._entries.get(root)
            if entry is None:
                entry = self._entries[root] = _Entry(manifest.payload, checked=True)
            for key in [key for key in entry.signed if key[0] == peer and not entry.holds[key]]:
                del entry.signed[key]  # of an earlier round with equal content, which nobody needs
            entry.signed[peer, round_] = signed
            entry.holds[peer, round_] += 1
            entry.used = self._tick()
            before = self._latest.get(peer)
            if before is None or round_ >= before[0]:
                self._latest[peer] = (round_, root)
                if before is not None:
                    self._let_go(before[1])
                for stale in [key for key in self._coming if key[0] == peer and not self._open[key]]:
                    self.drop(*stale)

    def release(self, peer: str, round_: int, root: str) -> None:
        """Undo one `keep`; a snapshot that is not in use is removed, unless it is its peer's last one."""
        with self._lock:
            entry = self._entries.get(root)
            if entry is None or (peer, round_) not in entry.holds:
                return
            entry.holds[peer, round_] -= 1
            if not entry.holds[peer, round_]:
                del entry.holds[peer, round_]
            self._let_go(root)

    def _let_go(self, root: str) -> None:
        entry = self._entries.get(root)
        if entry is not None and not entry.holds and all(root != last for _, last in self._latest.values()):
            self._remove(root)

    def _remove(self, root: str) -> None:
        self._entries.pop(root, None)
        self._latest = {peer: last for peer, last in self._latest.items() if last[1] != root}
        self._discard(self.path(root))
        self._discard(self._manifest_path(root))

    def _discard(self, path: Path) -> None:
        """Remove a file without waiting for the disk: renamed at once, deleted in a thread."""
        gone = path.with_name(f".{self._tick()}.{path.name}.gone")
        try:
            path.rename(gone)
        except FileNotFoundError:
            return
        self._threads.submit(gone.unlink, missing_ok=True)

    def _manifest_path(self, root: str) -> Path:
        return self.folder / f"{root}.manifest"

    def _tick(self) -> int:
        with self._lock:
            self._clock += 1
            return self._clock

    # ── at the start ──────────────────────────────────────────────────────────────────────────────────────────
    def _clean(self) -> None:
        """Take over the complete snapshots of the previous run, keep fresh parts, and remove all other files."""
        found: list[SignedManifest] = []
        for path in self.folder.glob("*.manifest"):
            try:
                data, signature = read_signed(path)
                publisher = pb.Manifest.FromString(data).agent
                # its signature was checked when it came; its content is checked before use (`verify`)
                signed = unseal(
                    data, signature, _taken, publisher=publisher, run=self._run, limits=self._manifest_limits
                )
            except (DimatError, ValueError):
                continue
            if path.stem == signed.manifest.payload.root and self.path(path.stem).exists():
                found.append(signed)
        for signed in sorted(found, key=lambda known: known.manifest.round):
            manifest = signed.manifest
            entry = self._entries[manifest.payload.root] = _Entry(manifest.payload, used=self._tick())
            entry.signed[manifest.agent, manifest.round] = signed
            self._latest[manifest.agent] = (manifest.round, manifest.payload.root)
        newest = {root for _, root in self._latest.values()}
        self._entries = {root: entry for root, entry in self._entries.items() if root in newest}
        for path in list(self.folder.iterdir()):
            known = path.suffix in (".safetensors", ".manifest") and path.stem in self._entries
            fresh = path.suffix == ".part" and time.time() - path.stat().st_mtime < STALE_PART_S
            if path.is_file() and not known and not fresh:
                path.unlink(missing_ok=True)


def _taken(data: bytes, signature: bytes) -> None:
    """Accept a signature that was checked before the manifest was written."""
