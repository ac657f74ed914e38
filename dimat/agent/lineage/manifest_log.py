"""The log of signed manifests of all fetched snapshots: who vouched for which content.

One JSON object per line, in `manifests.jsonl` of the agent's folder: the manifest's exact bytes and the signature over
them (hex), and their content in plain values. A ledger that gets too long drops its older half; its first line then
says up to which round of each agent: {"dropped": {agent: round}, "lines": count}.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from dimat.agent.lineage.lineage import Model
from dimat.agent.protocol.messages import MergeRecord
from dimat.errors import DataError
from dimat.events import Contribution
from dimat.net.transport import Fetched
from dimat.reading import as_type, parse_json
from dimat.weights.durable import write_bytes

LEDGER_BYTES = 64 * 2**20
"""Bound of a ledger's length, where no quota says otherwise."""
KNOWN = 256
"""Manifests that a ledger remembers to have written; a peer offers far fewer at a time."""


@dataclass(frozen=True, slots=True)
class Vouched:
    """One line of the ledger.

    `root`: address of the snapshot; `parents`: (agent, root, round, weight) of each part of the merge that its training
    started from; `manifest`, `signature`: the bytes; `hash`: blake3 of the manifest; `certificate`: the publisher's
    (DER), empty where it is not known.
    """

    agent: str
    round: int
    root: str
    parents: tuple[tuple[str, str, int, float], ...]
    manifest: bytes
    signature: bytes
    certificate: bytes = b""

    @property
    def hash(self) -> str:
        """Return the manifest's hash."""
        return blake3(self.manifest).hexdigest()


@dataclass(frozen=True, slots=True)
class Dropped:
    """The lines that a ledger has dropped at its bound: how many, and up to which round of each agent."""

    lines: int = 0
    rounds: Mapping[str, int] = field(default_factory=dict[str, int])


class ManifestLedger:
    """Appends manifests to a file, each once; of a file beyond `most_bytes` the older half is dropped.

    Any thread may call.
    """

    def __init__(self, path: Path, most_bytes: int = LEDGER_BYTES) -> None:
        self.path = path
        self.most_bytes = most_bytes
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._known: dict[tuple[str, int, str], None] = {}

    def note(self, fetched: Fetched) -> None:
        """Keep the manifest of a snapshot that has arrived; raises DataError if it cannot be written."""
        manifest, (data, signature) = fetched.manifest, fetched.signed
        key = (manifest.agent, manifest.round, manifest.payload.root)
        line = {
            "agent": manifest.agent,
            "round": manifest.round,
            "root": manifest.payload.root,
            "parents": [list(parent) for parent in manifest.parents],
            "manifest": data.hex(),
            "signature": signature.hex(),
            "certificate": fetched.certificate.hex(),
        }
        with self._lock:
            if key in self._known:
                return
            try:
                if self._file is None:
                    self._file = self.path.open("ab")
                # a line that a crash cut short stays behind as one damaged line of its own
                start = b"\n" if self._file.tell() and not self._known else b""
                self._file.write(start + json.dumps(line, separators=(",", ":")).encode() + b"\n")
                self._file.flush()
                self._known[key] = None
                if len(self._known) > KNOWN:
                    del self._known[next(iter(self._known))]
                if self._file.tell() > self.most_bytes:
                    self._drop_half()
            except OSError as error:
                raise DataError(f"cannot write {self.path}: {error.strerror or error}") from error

    def keep(self, wanted: Callable[[Vouched], bool]) -> None:
        """Drop the manifests that are no longer wanted, and lines that were cut short.

        Raises DataError if the file cannot be read or written.
        """
        with self._lock:
            try:
                before, lines = self._lines()
                said = [(line, _read_or_none(line)) for line in lines]
                kept = [line for line, entry in said if entry is not None and wanted(entry)]
                gone = [entry for _, entry in said if entry is not None and not wanted(entry)]
                self._rewrite(before, kept, gone, len(said) - len(kept))
            except OSError as error:
                raise DataError(f"cannot write {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _lines(self) -> tuple[Dropped, list[bytes]]:
        """Return what was dropped before, and the lines that are there."""
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        before = dropped_of(lines[0].decode(errors="replace")) if lines else None
        return (Dropped(), lines) if before is None else (before, lines[1:])

    def _drop_half(self) -> None:
        before, lines = self._lines()
        kept: list[bytes] = []
        room = self.most_bytes // 2
        for line in reversed(lines):
            room -= len(line) + 1
            if room < 0:
                break
            kept.append(line)
        gone = [_read_or_none(line) for line in lines[: len(lines) - len(kept)]]
        self._rewrite(before, kept[::-1], [entry for entry in gone if entry is not None], len(gone))

    def _rewrite(self, before: Dropped, kept: Sequence[bytes], gone: Iterable[Vouched], count: int) -> None:
        self._close()
        rounds = dict(before.rounds)
        for entry in gone:
            rounds[entry.agent] = max(entry.round, rounds.get(entry.agent, 0))
        head = json.dumps({"dropped": rounds, "lines": before.lines + count}, separators=(",", ":")).encode()
        write_bytes(self.path, b"\n".join([head, *kept]) + b"\n")


def _read_or_none(line: bytes) -> Vouched | None:
    try:
        return read_line(line.decode())
    except (ValueError, KeyError, TypeError):
        return None


def read_ledger(path: Path) -> Iterator[Vouched]:
    """Read a file of `ManifestLedger`, without lines that were cut short.

    Raises DataError if it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    for line in lines:
        try:
            yield read_line(line)
        except (ValueError, KeyError, TypeError):
            continue


def dropped_of(line: str) -> Dropped | None:
    """Return the dropped lines that the first line of a ledger states; None if it is another line."""
    try:
        found = parse_json(line, finite=True)
        return Dropped(int(found["lines"]), {str(agent): int(number) for agent, number in found["dropped"].items()})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def read_line(line: str) -> Vouched:
    """Return a line's entry; raises ValueError, KeyError or TypeError if it is not one."""
    found = parse_json(line, finite=True)
    data = {key: bytes.fromhex(found[key]) for key in ("manifest", "signature", "certificate") if key in found}
    return as_type(Vouched, {**found, **data})


def peers_records(vouched: Iterable[Vouched]) -> list[MergeRecord]:
    """Return peers' merges as their own manifests describe them.

    Of each snapshot: the parts of the merge that its training started from.
    """
    records: dict[tuple[str, int], MergeRecord] = {}
    for entry in vouched:
        if entry.parents:
            parts = tuple(Contribution(agent=a, snapshot=r, round=n, weight=w) for a, r, n, w in entry.parents)
            own = next((part for part in parts if part.agent == entry.agent), None)
            number = _started_from(entry)
            records[entry.agent, number] = MergeRecord(
                entry.agent,
                number,
                own.snapshot if own is not None else "",
                parts,
                kind="merge" if own is not None else "join",
            )
    return list(records.values())


def starts(vouched: Iterable[Vouched]) -> dict[Model, int]:
    """Return by snapshot (agent, round) the round of the merge its training started from.

    0: its agent's first network.
    """
    return {(entry.agent, entry.round): _started_from(entry) for entry in vouched}


def _started_from(entry: Vouched) -> int:
    own = next((number for agent, _, number, _ in entry.parents if agent == entry.agent), None)
    if own is not None:
        return own
    return entry.round - 1 if entry.parents else 0  # a newcomer took over a peer's weights some round before
