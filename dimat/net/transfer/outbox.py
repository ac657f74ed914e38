"""What this agent offers now: its signed manifests, and a number that grows with every change of them."""

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
    """The snapshots of `agent` in its own store, as peers are told of them.

    Signed manifests lie beside the snapshots (`<round>-<root>.manifest`), so that after a restart the same is offered.
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
        self._disk = asyncio.Lock()
        self._writing: set[asyncio.Task[None]] = set()

    def restore(self, check: Verify, manifest_limits: ManifestLimits, noticed: Callable[[str], None]) -> None:
        """Offer again what was offered before a restart, where the payload still lies in the store."""
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

    def publish(self, manifest: Manifest, noticed: Callable[[str], None]) -> None:
        """Offer a recorded snapshot; a second time changes nothing. DataError where no reader would take it."""
        if self._store.find(self._agent, manifest.round) is not None and self._key(manifest) in self._signed:
            return
        signed = seal(manifest, self._sign)
        self._offer(signed)
        if self._key(manifest) in self._signed:
            self._later(write_signed, self._path(manifest), signed, noticed)

    def leave(self, reason: str) -> None:
        """Say that this agent leaves."""
        self.leaving = reason or "it stops"
        self._change()

    def reply(self) -> pb.ManifestsReply:
        """Return all that is offered, oldest round first."""
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
        """Return whether there is more than what a reader has seen in a session."""
        return session != self.session or seen != self._sequence

    def payload(self, root: str) -> Payload | None:
        """Return the payload with this address, of a snapshot or of a form, if it is offered."""
        for signed in self._signed.values():
            for payload in (signed.manifest.payload, *(form.payload for form in signed.manifest.forms)):
                if payload.root == root:
                    return payload
        return None

    def encoding(self, root: str) -> str:
        """Return the encoding of the payload with this address: a form's, else fp32, which is a snapshot's own."""
        forms = (form for signed in self._signed.values() for form in signed.manifest.forms)
        return next((form.encoding for form in forms if form.payload.root == root), "fp32")

    def payloads(self) -> list[Payload]:
        """Return the payloads of whole snapshots that are offered."""
        return [signed.manifest.payload for signed in self._signed.values()]

    async def settle(self) -> None:
        """Wait until what was published is written down."""
        while self._writing:
            await asyncio.wait(self._writing)

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

    def _later(
        self,
        write: Callable[[Path, SignedManifest], None],
        path: Path,
        signed: SignedManifest,
        noticed: Callable[[str], None],
    ) -> None:
        async def task() -> None:
            async with self._disk:
                try:
                    await self._threads.submit(write, path, signed)
                    if self._key(signed.manifest) not in self._signed:
                        await self._threads.submit(path.unlink, missing_ok=True)
                except (DataError, OSError) as error:
                    noticed(f"after a restart round {signed.manifest.round} is to be published anew: {error}")

        running = asyncio.get_running_loop().create_task(task())
        self._writing.add(running)
        running.add_done_callback(self._writing.discard)

    def _path(self, manifest: Manifest) -> Path:
        return self._store.folder / f"{manifest.round:012d}-{manifest.payload.root[:16]}.manifest"

    @staticmethod
    def _key(manifest: Manifest) -> tuple[int, str]:
        return manifest.round, manifest.payload.root
