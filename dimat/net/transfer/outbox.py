"""The outbox: the snapshots that this agent offers now, as signed manifests."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from pathlib import Path

from dimat.errors import DataError, DimatError
from dimat.net.manifest import ManifestLimits, Sign, SignedManifest, Verify, read_signed, seal, unseal, write_signed
from dimat.net.threads import Notifier, Threads
from dimat.weights.snapshot import Manifest, Payload, SnapshotStore
from dimat.wire.v1 import peer_pb2 as pb


class Outbox:
    """The snapshots of `agent` in its store, as they are offered to peers.

    Signed manifests are beside the snapshots (`<round>-<root>.manifest`), so that the same are offered after a restart.
    `write_manifests` writes them, from the start of the transport until `close`.
    """

    def __init__(self, store: SnapshotStore, run: str, agent: str, sign: Sign, threads: Threads) -> None:
        self.session = secrets.token_hex(8)  # of this life: never to come again, so from no seeded generator
        self.leaving = ""
        self.changed = Notifier()
        self._store = store
        self._run = run
        self._agent = agent
        self._sign = sign
        self._threads = threads
        self._sequence = 1
        self._signed: dict[tuple[int, str], SignedManifest] = {}
        self._unwritten: asyncio.Queue[SignedManifest | None] = asyncio.Queue()

    def restore(self, check: Verify, manifest_limits: ManifestLimits, noticed: Callable[[str], None]) -> None:
        """Offer the snapshots from before a restart again, if the payload is still in the store."""
        found: list[SignedManifest] = []
        for path in sorted(self._store.folder.glob("*.manifest")):
            try:
                data, signature = read_signed(path)
                signed = unseal(data, signature, check, publisher=self._agent, run=self._run, limits=manifest_limits)
            except DimatError as error:
                noticed(f"{path.name} is not offered again: {error}")
                path.unlink(missing_ok=True)
                continue
            if self._store.path(signed.manifest.payload.root).exists():
                found.append(signed)
            else:
                path.unlink(missing_ok=True)
        for signed in sorted(found, key=lambda known: known.manifest.round):
            self._offer(signed)

    def publish(self, manifest: Manifest) -> None:
        """Offer a recorded snapshot; offering it again changes nothing. DataError if no reader would accept it."""
        if self._store.find(self._agent, manifest.round) is not None and self._key(manifest) in self._signed:
            return
        signed = seal(manifest, self._sign)
        self._offer(signed)
        if self._key(manifest) in self._signed:
            self._unwritten.put_nowait(signed)

    def sign_again(self) -> None:
        """Sign the offered manifests with the current key: readers check them with its certificate."""
        for key, known in list(self._signed.items()):
            self._signed[key] = seal(known.manifest, self._sign)
            self._unwritten.put_nowait(self._signed[key])
        self._change()

    def leave(self, reason: str) -> None:
        """Tell readers, in the next reply to each, that this agent leaves."""
        self.leaving = reason or "it stops"
        self._change()

    def reply(self) -> pb.ManifestsReply:
        """Return all offered manifests, the oldest round first."""
        return pb.ManifestsReply(
            sequence=self._sequence,
            session=self.session,
            leaving=self.leaving,
            offered=[
                pb.SignedManifest(manifest=signed.data, signature=signed.signature)
                for _, signed in sorted(self._signed.items())
            ],
        )

    def news(self, seen: int, session: str) -> bool:
        """Return whether anything has changed since a reader saw number `seen` of a session."""
        return session != self.session or seen != self._sequence

    def payload(self, root: str) -> Payload | None:
        """Return the offered payload with this address, of a snapshot or of a form; None if it is not offered."""
        for signed in self._signed.values():
            for payload in (signed.manifest.payload, *(form.payload for form in signed.manifest.forms)):
                if payload.root == root:
                    return payload
        return None

    def encoding(self, root: str) -> str:
        """Return the encoding of the payload with this address: that of its form, or fp32 for a plain snapshot."""
        forms = (form for signed in self._signed.values() for form in signed.manifest.forms)
        return next((form.encoding for form in forms if form.payload.root == root), "fp32")

    def payloads(self) -> list[Payload]:
        """Return the payloads of the offered snapshots, without their forms."""
        return [signed.manifest.payload for signed in self._signed.values()]

    async def write_manifests(self, noticed: Callable[[str], None]) -> None:
        """Write each published manifest beside its snapshot, in turn, until `close` is called and all are written."""
        while (signed := await self._unwritten.get()) is not None:
            path = self._path(signed.manifest)
            try:
                await self._threads.submit(write_signed, path, signed)
                if self._key(signed.manifest) not in self._signed:
                    await self._threads.submit(path.unlink, missing_ok=True)
            except (DataError, OSError) as error:
                noticed(f"round {signed.manifest.round} must be published again after a restart: {error}")

    def close(self) -> None:
        """Let `write_manifests` end once all published manifests are written."""
        self._unwritten.put_nowait(None)

    # ── changes ──────────────────────────────────────────────────────────────────────────────────────────────
    def _offer(self, signed: SignedManifest) -> None:
        manifest = signed.manifest
        if self._store.find(self._agent, manifest.round) is None:
            self._store.publish(manifest)
        self._signed[self._key(manifest)] = signed
        # the store keeps the newest few
        kept = {self._key(known) for known in self._store.offered(self._agent)}
        for key in [key for key in self._signed if key not in kept]:
            gone = self._signed.pop(key).manifest
            self._path(gone).unlink(missing_ok=True)
        self._change()

    def _change(self) -> None:
        self._sequence += 1
        self.changed.fire()

    def _path(self, manifest: Manifest) -> Path:
        return self._store.folder / f"{manifest.round:012d}-{manifest.payload.root[:16]}.manifest"

    @staticmethod
    def _key(manifest: Manifest) -> tuple[int, str]:
        return manifest.round, manifest.payload.root
