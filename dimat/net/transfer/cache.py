"""The cache of peers' snapshots on the disk: whole ones, parts of incoming ones, and its quota.

A snapshot is kept while it is in use; the last one of each peer stays beyond that, as the base of the peer's next delta
and for the blocks that the next one shares with it. Equal snapshots have one address and are stored once.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
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
    """A whole snapshot.

    `signed`: manifests by (peer, round); `holds`: number of uses by (peer, round); `checked`: its content was read and
    found right since this agent started; `used`: grows with use, for the quota.
    """

    payload: Payload
    signed: dict[tuple[str, int], SignedManifest] = field(default_factory=dict[tuple[str, int], SignedManifest])
    holds: Counter[tuple[str, int]] = field(default_factory=Counter[tuple[str, int]])
    checked: bool = False
    used: int = 0


class SnapshotCache:
    """Received snapshots in `folder`, a folder of their own.

    `quota_bytes`: disk that they may take, of which the oldest that are not in use go first; `reserve_bytes`: disk that
    stays free. Methods that touch much of the disk (`verify`, `begin`, `finish`, `link`) may be called in threads.
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
        self._clock = 0
        make_folder(folder)
        self._clean()

    # ── whole snapshots ───────────────────────────────────────────────────────────────────────────────────────
    def path(self, root: str) -> Path:
        """Return the path of a whole snapshot with this address, whether it is there or not."""
        return self.folder / f"{root}.safetensors"

    def payload(self, root: str) -> Payload | None:
        """Return the payload of a whole snapshot; None where it is not there."""
        entry = self._entries.get(root)
        return None if entry is None else entry.payload

    def find(self, peer: str, round_: int, root: str) -> SignedManifest | None:
        """Return a peer's signed manifest of a whole snapshot; None where it is not there."""
        entry = self._entries.get(root)
        return None if entry is None else entry.signed.get((peer, round_))

    def sources(self, but: str) -> list[tuple[Path, Payload]]:
        """Return the files whose blocks another snapshot may share, the last used first."""
        entries = sorted(self._entries.items(), key=lambda item: -item[1].used)
        return [(self.path(root), entry.payload) for root, entry in entries if root != but]

    def verify(self, root: str) -> bool:
        """Return whether a snapshot is there and undamaged; read once a run, and removed where it is damaged."""
        entry = self._entries.get(root)
        if entry is None:
            return False
        if not entry.checked:
            try:
                verify_file(self.path(root), entry.payload)
            except DataError:
                self._entries.pop(root, None)
                self.path(root).unlink(missing_ok=True)
                self._manifest_path(root).unlink(missing_ok=True)
                return False
            entry.checked = True
        return True

    # ── incoming payloads ─────────────────────────────────────────────────────────────────────────────────────
    def make_room(self, peer: str, payload: Payload, more: int = 0) -> None:
        """Make room in the quota for a payload and `more` bytes; DataError where snapshots in use leave too little."""
        amount = payload.bytes + more
        taken = sum(entry.payload.bytes for entry in self._entries.values())
        taken += sum(coming.bytes for key, coming in self._coming.items() if key != (peer, payload.root))
        for key in [key for key in self._coming if not self._open[key] and key != (peer, payload.root)]:
            if taken + amount <= self._quota_bytes:
                return
            taken -= self._coming[key].bytes
            self.drop(*key)
        for root in sorted(self._entries, key=lambda root: self._entries[root].used):
            if taken + amount <= self._quota_bytes:
                return
            entry = self._entries[root]
            if not entry.holds:
                taken -= entry.payload.bytes
                self._remove(root)
        if taken + amount > self._quota_bytes:
            raise DataError(
                f"no room for a snapshot of {amount:,} bytes in {self.folder}: {taken:,} bytes are needed now, the "
                f"quota is {self._quota_bytes:,}; raise disk_bytes"
            )

    def begin(self, peer: str, payload: Payload) -> ReceivedBlocks:
        """Open an incoming payload, with the blocks that an earlier attempt has left; to be closed by `end`."""
        part, whole = self.part_path(peer, payload.root), self.path(payload.root)
        if payload.root not in self._entries and whole.exists():
            whole.replace(part)  # an attempt was called off when the file had just got its name
        received = ReceivedBlocks(part, payload, self._reserve_bytes)
        self._coming[peer, payload.root] = payload
        self._open[peer, payload.root] += 1
        return received

    def end(self, peer: str, received: ReceivedBlocks, root: str) -> None:
        """Close a payload that `begin` has opened; missing blocks are left for another attempt."""
        self._open[peer, root] -= 1
        if not self._open[peer, root]:
            del self._open[peer, root]
        self._threads.submit(received.close)

    def part_path(self, peer: str, root: str) -> Path:
        """Return the path of a payload while it comes in from a peer."""
        return self.folder / f"{root}.{blake3(peer.encode()).hexdigest()[:16]}.part"

    def finish(self, peer: str, received: ReceivedBlocks, root: str) -> Path:
        """Rename a whole payload to its path, and return that."""
        path = self.path(root)
        received.finish(path, durable=self._durable)
        self._coming.pop((peer, root), None)
        return path

    def link(self, source: Path, payload: Payload) -> bool:
        """Link (else copy) a payload from another folder; False where it is not there or damaged."""
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
        """Remove an incoming payload, and the whole payload where it is not that of a snapshot."""
        self._coming.pop((peer, root), None)
        self._discard(self.part_path(peer, root))
        if root not in self._entries:
            self._discard(self.path(root))

    def write_manifest(self, signed: SignedManifest) -> None:
        """Write a manifest beside its snapshot, for this agent's next run."""
        write_signed(self._manifest_path(signed.manifest.payload.root), signed, durable=self._durable)

    # ── use ───────────────────────────────────────────────────────────────────────────────────────────────────
    def keep(self, peer: str, signed: SignedManifest) -> None:
        """Hold a whole snapshot until `release`; it becomes the last one of its peer if its round is the highest."""
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
        """Undo one `keep`; a snapshot that is not in use goes, unless it is its peer's last one."""
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
        self._clock += 1
        return self._clock

    # ── at the start ──────────────────────────────────────────────────────────────────────────────────────────
    def _clean(self) -> None:
        """Take over the whole snapshots of the run before, keep fresh parts, and remove all other files."""
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
