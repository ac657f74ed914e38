"""Snapshots: an agent's weights after one round, content-addressed, and their store.

A snapshot is a safetensors payload (weights, and `aux.…` statistics if a merge needs them) and a manifest. The
payload's address is its root hash: blake3 over the concatenated blake3 hashes of its blocks and its length, so that a
reader can check block by block and equal content has one address. Payloads appear under their address by rename, so a
reader never sees half of one.
"""

from __future__ import annotations

import json
from bisect import insort
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from blake3 import blake3

from dimat.errors import DataError
from dimat.events import Contribution
from dimat.reading import as_type, read_table
from dimat.weights.durable import write_bytes

BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Payload:
    """Address and checksums of a payload.

    `blocks`: hex blake3 of each block of `block_bytes` (the last is shorter).
    """

    root: str
    bytes: int
    blocks: tuple[str, ...]
    block_bytes: int = BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Form:
    """A smaller payload that decodes to the content of a snapshot.

    `after`: the snapshot to which this is a delta, and which the reader must have; "" for none
    (`dimat.weights.encodings`).
    """

    encoding: str
    payload: Payload
    after: str = ""


@dataclass(frozen=True, slots=True)
class RecordedSnapshot:
    """A snapshot that an agent has recorded and may still publish.

    `forms`: its smaller encodings; `schema`: hash of the weights' names, shapes and types; `samples`: examples in the
    training that produced it.
    """

    payload: Payload
    forms: tuple[Form, ...]
    schema: str
    samples: int

    def save(self, folder: Path) -> None:
        """Write it beside its payload; DataError on failure."""
        write_bytes(folder / f"{self.payload.root}.json", json.dumps(asdict(self)).encode())

    @staticmethod
    def load(folder: Path, root: str) -> RecordedSnapshot | None:
        """Read the snapshot recorded under an address.

        None if there is none, DataError if it is damaged.
        """
        path = folder / f"{root}.json"
        try:
            return as_type(RecordedSnapshot, read_table(path)) if path.exists() else None
        except ValueError as error:
            raise DataError(f"{path} is damaged: {error}") from None

    @staticmethod
    def addresses(folder: Path, root: str) -> frozenset[str]:
        """Return the addresses of all payloads of the snapshot recorded under `root`, including that one."""
        recorded = RecordedSnapshot.load(folder, root) if root else None
        forms = () if recorded is None else (form.payload.root for form in recorded.forms)
        return frozenset((root, *forms))


@dataclass(frozen=True, slots=True)
class Manifest:
    """An agent's statement about a snapshot that it offers.

    `payload`: the snapshot as every reader obtains it, however it is sent; `encoding`: the one through which its
    weights were passed, and `forms`: its encodings that are smaller than the payload itself. `parents`: (agent, root,
    round, weight) of each part of the merge from which training started; `pushed`: by reader, all push-sum weight ever
    sent to it; `schema`: hash of names, shapes and dtypes of the weights (`schema_hash`): statistics are not part of
    it, so that it says whether two models fit, whatever merge method their agents use.
    """

    run: str
    agent: str
    round: int
    basis: str
    schema: str
    payload: Payload
    encoding: str = "fp32"
    forms: tuple[Form, ...] = ()
    base: str = ""
    samples: int = 0
    parents: tuple[tuple[str, str, int, float], ...] = ()
    pushed: Mapping[str, float] = field(default_factory=dict[str, float])
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])

    @staticmethod
    def of(
        snapshot: RecordedSnapshot,
        *,
        run: str,
        agent: str,
        round: int,
        basis: str,
        base: str,
        parents: Iterable[Contribution],
        pushed: Mapping[str, float],
    ) -> Manifest:
        """Return the manifest of a recorded snapshot."""
        return Manifest(
            run=run,
            agent=agent,
            round=round,
            basis=basis,
            schema=snapshot.schema,
            payload=snapshot.payload,
            encoding=snapshot.forms[0].encoding if snapshot.forms else "fp32",
            forms=snapshot.forms,
            base=base,
            samples=snapshot.samples,
            parents=tuple((part.agent, part.snapshot, part.round, part.weight) for part in parents),
            pushed=pushed,
        )


def checksum(data: bytes | memoryview, block_bytes: int = BLOCK_BYTES) -> Payload:
    """Return the payload record of `data`."""
    return checksum_pieces((data,), block_bytes)


def checksum_pieces(pieces: Iterable[bytes | memoryview], block_bytes: int = BLOCK_BYTES) -> Payload:
    """Return the payload record of data that arrive piece by piece."""
    blocks: list[bytes] = []
    digest, room, size = blake3(), block_bytes, 0
    for piece in pieces:
        view = memoryview(piece)
        size += len(view)
        while len(view):
            part = view[:room]
            digest.update(part)
            room -= len(part)
            view = view[len(part) :]
            if not room:
                blocks.append(digest.digest())
                digest, room = blake3(), block_bytes
    if room < block_bytes:
        blocks.append(digest.digest())
    root = blake3(b"".join(blocks) + size.to_bytes(8, "big")).hexdigest()
    return Payload(root, size, tuple(b.hex() for b in blocks), block_bytes)


def checksum_file(path: Path) -> Payload:
    """Return the payload record of a file; OSError if it cannot be read."""
    with path.open("rb") as file:
        return checksum_pieces(iter(lambda: file.read(BLOCK_BYTES), b""))


def make_folder(folder: Path) -> None:
    """Make a folder for snapshots, if it is not there; DataError on failure."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the snapshot store {folder}: {error.strerror or error}") from error


def record_bytes(folder: Path, data: bytes, *, durable: bool = True) -> Payload:
    """Write a payload into a store folder under its address and return it.

    Content already there is not rewritten.
    """
    payload = checksum(data)
    path = folder / f"{payload.root}.safetensors"
    if not path.exists():
        write_bytes(path, data, durable=durable)
    return payload


class SnapshotStore:
    """Payload files of one run, and their remaining users.

    It keeps an agent's newest `keep` snapshots, and those in use (`hold`): by readers, and by agents that have recorded
    a snapshot and not yet published it. Payload files are removed as soon as nobody holds them, so disk use is bounded.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep
        self._published: dict[str, list[Manifest]] = {}
        self._holds: Counter[str] = Counter()
        self._verified: set[str] = set()
        make_folder(folder)

    def path(self, root: str) -> Path:
        """Return the path of the payload with this address, whether it exists or not."""
        return self.folder / f"{root}.safetensors"

    def take_in(self, payload: Payload, folder: Path) -> None:
        """Move a payload that was recorded in another folder of the same disk into the store.

        Each process that records has a folder of its own, so that a payload released here meanwhile is never one that
        it has just written.
        """
        try:
            (folder / f"{payload.root}.safetensors").replace(self.path(payload.root))
        except OSError as error:
            raise DataError(f"cannot move {payload.root} into {self.folder}: {error.strerror or error}") from error

    def publish(self, manifest: Manifest) -> None:
        """Offer a recorded snapshot; the agent's oldest one beyond `keep` is released."""
        held = self._published.setdefault(manifest.agent, [])
        insort(held, manifest, key=lambda known: known.round)
        for root in roots_of(manifest):
            self.hold(root)
        while len(held) > self._keep:
            for root in roots_of(held.pop(0)):
                self.release(root)

    def offered(self, agent: str) -> Sequence[Manifest]:
        """Return the manifests of an agent that are still held, oldest first."""
        return self._published.get(agent, [])

    def find(self, agent: str, round_: int) -> Manifest | None:
        """Return the manifest that `agent` published for a round, if it is still held."""
        return next((m for m in self._published.get(agent, ()) if m.round == round_), None)

    def verify(self, payload: Payload) -> Path:
        """Check length and every block of a payload file; DataError describes the fault.

        Checked once per address.
        """
        path = self.path(payload.root)
        if payload.root not in self._verified:
            verify_file(path, payload)
            self._verified.add(payload.root)
        return path

    def sweep(self, keep: Collection[str]) -> None:
        """Remove the files that a crash left behind: not held, and not named in `keep`."""
        for path in self.folder.glob("*.safetensors"):
            if path.stem not in self._holds and path.stem not in keep:
                path.unlink(missing_ok=True)
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)

    def hold(self, root: str) -> None:
        """Keep a payload until `release`, even if its publisher releases it."""
        self._holds[root] += 1

    def release(self, root: str) -> None:
        """Undo one `hold`; a payload that nobody holds any more is removed."""
        self._holds[root] -= 1
        if self._holds[root] <= 0:
            del self._holds[root]
            self._verified.discard(root)
            self.path(root).unlink(missing_ok=True)


def roots_of(manifest: Manifest) -> tuple[str, ...]:
    """Return the addresses of all payloads of a snapshot: its own, and those of its forms."""
    return manifest.payload.root, *(form.payload.root for form in manifest.forms)


def verify_file(path: Path, payload: Payload) -> None:
    """Check a payload file against its record, block by block.

    DataError if it is missing, cut short or altered.
    """
    try:
        size = path.stat().st_size
        if size != payload.bytes:
            raise DataError(f"snapshot {path} is damaged: {size} bytes, its manifest says {payload.bytes}")
        with path.open("rb") as file:
            for number, expected in enumerate(payload.blocks):
                if blake3(file.read(payload.block_bytes)).hexdigest() != expected:
                    raise DataError(f"snapshot {path} is damaged: block {number} does not match its hash")
    except OSError as error:
        raise DataError(f"cannot read snapshot {path}: {error.strerror or error}") from error
