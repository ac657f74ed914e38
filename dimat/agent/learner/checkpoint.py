"""Checkpoints: an agent's whole state, and the folder that keeps the last few.

A checkpoint is plain tensors and plain values in a safetensors file, without pickle. Files appear by rename, after
fsync, and carry the hash of their content in their name, so that a reader sees a whole checkpoint or knows that it
does not. A damaged one is passed over for the one before.

What is large lies in parts, safetensors files of their own in `parts/`, which the checkpoint names by the address of
their content, so that what has not changed is not written again: `weights` (with the statistics beside them: the very
bytes of a snapshot, so that one that was recorded is shared and not copied), `optimizer`, `method`. A part stays as
long as any checkpoint file in the folder names it, whatever that file is called. So another state costs only what is
new in it:

- `set_aside("training", checkpoint)` keeps one beside the numbered ones, in the middle of a round, say; the next one
  under that name takes its place, `aside` reads it, `drop` removes it;
- `set_aside("trusted")` keeps the newest numbered one under that name, however many follow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3
from torch import Tensor

from dimat.agent.protocol.state import MachineState
from dimat.config.agent import CHECKPOINTS_KEPT
from dimat.errors import DataError
from dimat.merge.shared_statistics import AUX, beside
from dimat.reading import as_type, parse_json
from dimat.train.trainer import TrainerState
from dimat.weights.durable import share_file, write_bytes
from dimat.weights.header import LONGEST_HEADER, parse_header
from dimat.weights.snapshot import checksum_file, checksum_pieces, make_folder
from dimat.weights.tensors import EncodedTensors, is_recorded, open_tensors, record_tensors

FORMAT = "3"
TRUSTED = "trusted"
"""Name of the checkpoint from before the first doubtful merge."""
READ = ("2", FORMAT)
"""Formats that are read: in the first of them all tensors lay in the checkpoint's own file."""
PART_BYTES = 16 * 2**10
"""Tensors that take less stay in the checkpoint's own file."""
NAME = re.compile(r"(\d{9})-(\d{9})-([a-z]+)\.([0-9a-f]{32})\.safetensors")
ASIDE = re.compile(r"([a-z][a-z-]*)\.([0-9a-f]{32})\.safetensors")
_PREFIXES = {"optimizer": "trainer/optimizer/", "method": "method/"}
_MODEL, _STATISTICS = "trainer/model/", "statistics/"

Value = int | float | str


@dataclass(frozen=True, slots=True)
class Stored:
    """Tensors by name, and plain values by name, as they lie in a file; `parts`: address of each file beside it."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    parts: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An agent at the end of a step of its round.

    `machine`: the round machine (round, basis, newest snapshot, push-sum weight, peers' offers); `trainer`: weights,
    optimizer, random streams, position in the data; `method_tensors`, `method_values`: what the merge method carries
    from merge to merge; `schema`: hash of the model's tensor names, shapes and types; `statistics`: what the merge to
    come rests on beside weights, as it was published with them (stage "trained"); `data`: which data it trained on
    (`own_data.describe_data`), empty where its user's loop reads them and in older checkpoints; `norms`: by
    tensor, those that own training has made (`dimat.merge.growth`); `doubt`: rounds of the first and last doubtful
    merge, 0 for none.
    """

    machine: MachineState
    trainer: TrainerState
    schema: str
    method_tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    method_values: Mapping[str, Value] = field(default_factory=dict[str, Value])
    statistics: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    data: Mapping[str, Value] = field(default_factory=dict[str, Value])
    norms: Mapping[str, float] = field(default_factory=dict[str, float])
    doubt: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The newest checkpoint that can be read.

    `published`: the last round that a checkpoint of stage "trained" was ever made for, readable or not; `passed_over`:
    why newer ones could not be read.
    """

    checkpoint: Checkpoint
    published: int
    passed_over: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Encoded:
    """`data`: of a checkpoint's own file; `weights`: the part that holds its weights alone; `left`: parts to write."""

    data: bytes
    weights: Path | None
    left: Sequence[Mapping[str, Tensor]]


class CheckpointStore:
    """The last `keep` checkpoints of one agent in a folder of their own, and those that were set aside.

    `durable`: they survive power loss; `elsewhere`: folders of snapshots on the same disk, whose files are shared where
    a part has their content.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = CHECKPOINTS_KEPT,
        *,
        elsewhere: Sequence[Path] = (),
        durable: bool = True,
    ) -> None:
        self.folder = folder
        self._parts = folder / "parts"
        self._keep = keep
        self._elsewhere = elsewhere
        self._durable = durable
        self._weights: Path | None = None
        self._known: dict[str, frozenset[str]] = {}  # parts by checkpoint file
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left_behind in (*folder.glob(".*.tmp"), *self._parts.glob(".*.tmp")):
                left_behind.unlink()
        except OSError as error:
            raise DataError(f"cannot make the checkpoint folder {folder}: {error.strerror or error}") from error

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, then remove those beyond `keep`.

        DataError where it cannot be written.
        """
        encoded = self._encode(checkpoint)
        self._record(encoded.left)
        path = self._write(checkpoint, encoded)
        self._prune(encoded)
        return path

    def begin(self, checkpoint: Checkpoint) -> Callable[[], None] | None:
        """Write a checkpoint but for what nobody else waits for, the state of optimizer and merge method. Return what
        completes it, None where nothing is left: to be called before those change, and again where it raised DataError.

        From here on a snapshot of these weights may be published. Until it is complete the checkpoint cannot be read:
        a crash in between costs the round, which counts as published. DataError where it cannot be written.
        """
        encoded = self._encode(checkpoint)
        self._write(checkpoint, encoded)

        def complete() -> None:
            self._record(encoded.left)
            self._prune(encoded)

        if encoded.left:
            return complete
        complete()
        return None

    def share_weights(self, path: Path) -> bool:
        """Give the weights of the checkpoint that was saved last another name; False where they are in no file of
        their own, or not alone in it. DataError where that fails."""
        if self._weights is None:
            return False
        try:
            share_file(self._weights, path, durable=self._durable)
        except FileNotFoundError:
            return False
        return True

    def newest(
        self, run: str, agent: str, schema: str, fault_of: Callable[[Checkpoint], str] = lambda _: ""
    ) -> Loaded | None:
        """Return the newest checkpoint that can be read and has no fault, None where none was ever written.

        `fault_of`: why a checkpoint is of no use, or nothing. Where one has a fault, the one that is set aside as
        `TRUSTED` is gone back to, if there is one. Raises DataError where all are damaged, and where it is another
        run's, agent's or model's, naming both.
        """
        names = self._names()
        passed_over: list[str] = []
        published = max((int(name[1]) for name in names if name[2] == "trained"), default=0)
        for name in reversed(names):
            path = self.folder / name[4]
            try:
                checkpoint = read_checkpoint(path)
            except DataError as error:
                passed_over.append(str(error))
                continue
            _check_whose(path, checkpoint, run, agent, schema)
            if not (fault := fault_of(checkpoint)):
                return Loaded(checkpoint, published, tuple(passed_over))
            passed_over.append(f"checkpoint {path}: {fault}")
            trusted = self.aside(TRUSTED, run, agent, schema)
            if trusted is not None and not fault_of(trusted):
                number = trusted.machine.round
                passed_over.append(f"all checkpoints since the doubtful merge of round {number} are passed over")
                return Loaded(trusted, published, tuple(passed_over))
        if passed_over:
            raise DataError(
                f"no checkpoint in {self.folder} can be read: {passed_over[0]}; restore one from a backup, or remove "
                "the folder to begin as a newcomer"
            )
        return None

    # ── beside the last few ──────────────────────────────────────────────────────────────────────────────────
    def set_aside(self, name: str, checkpoint: Checkpoint | None = None) -> None:
        """Keep a checkpoint, or the newest one, under a name (of letters and "-") until another takes its place.

        DataError where it cannot be written, and where there is none.
        """
        before = self._aside(name)
        if checkpoint is not None:
            encoded = self._encode(checkpoint)
            self._record(encoded.left)
            path = self.folder / f"{name}.{digest(encoded.data)}.safetensors"
            write_bytes(path, encoded.data, durable=self._durable)
        else:
            newest = self._names()[-1:]
            if not newest:
                raise DataError(f"there is no checkpoint in {self.folder} to set aside")
            path = self.folder / f"{name}.{newest[0][3]}.safetensors"
            share_file(self.folder / newest[0][4], path, durable=self._durable)
        self._remove([old for old in before if old != path])

    def aside(self, name: str, run: str, agent: str, schema: str) -> Checkpoint | None:
        """Return the checkpoint that was set aside under a name, None where there is none.

        DataError where it is damaged, and where it is another run's, agent's or model's.
        """
        path = max(self._aside(name), key=lambda file: file.stat().st_mtime_ns, default=None)
        if path is None:
            return None
        checkpoint = read_checkpoint(path)
        _check_whose(path, checkpoint, run, agent, schema)
        return checkpoint

    def drop(self, name: str) -> None:
        """Remove what was set aside under a name, if anything was."""
        self._remove(self._aside(name))

    # ── files ────────────────────────────────────────────────────────────────────────────────────────────────
    def _encode(self, checkpoint: Checkpoint) -> _Encoded:
        """Write the part of a checkpoint that holds its weights."""
        tensors = {f"trainer/{name}": tensor for name, tensor in checkpoint.trainer.tensors.items()}
        tensors |= {f"method/{name}": tensor for name, tensor in checkpoint.method_tensors.items()}
        tensors |= {_STATISTICS + name: tensor for name, tensor in checkpoint.statistics.items()}
        parts: dict[str, str] = {}
        model = {n.removeprefix(_MODEL): t for n, t in tensors.items() if n.startswith(_MODEL)}
        candidates = {"weights": beside(model, checkpoint.statistics)}
        for part, prefix in _PREFIXES.items():
            candidates[part] = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        left: list[Mapping[str, Tensor]] = []
        for part, held in candidates.items():
            if sum(tensor.nbytes for tensor in held.values()) < PART_BYTES:
                continue
            make_folder(self._parts)
            if part == "weights":
                recorded = record_tensors(self._parts, held, elsewhere=self._elsewhere, durable=self._durable)
            else:
                recorded = checksum_pieces(EncodedTensors(held).pieces())
                if not is_recorded(self._parts, recorded):
                    left.append(held)
            parts[part] = recorded.root
        gone = (
            *((_MODEL, _STATISTICS) if "weights" in parts else ()),
            *(_PREFIXES[p] for p in parts if p in _PREFIXES),
        )
        values = {
            "machine": checkpoint.machine.to_dict(),
            "trainer": dict(checkpoint.trainer.values),
            "method": dict(checkpoint.method_values),
            "schema": checkpoint.schema,
            "statistics": [*checkpoint.statistics],
            "data": dict(checkpoint.data),
            "norms": dict(checkpoint.norms),
            "doubt": [*checkpoint.doubt],
        }
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(gone)}
        alone = "weights" in parts and not checkpoint.statistics
        weights = self._parts / f"{parts['weights']}.safetensors" if alone else None
        return _Encoded(encode(Stored(own, values, parts)), weights, left)

    def _record(self, parts: Sequence[Mapping[str, Tensor]]) -> None:
        for tensors in parts:
            record_tensors(self._parts, tensors, durable=self._durable)

    def _write(self, checkpoint: Checkpoint, encoded: _Encoded) -> Path:
        """Write a checkpoint's own file, as the newest."""
        machine, names = checkpoint.machine, self._names()
        number = int(names[-1][0]) + 1 if names else 1
        path = self.folder / f"{number:09d}-{machine.round:09d}-{machine.stage}.{digest(encoded.data)}.safetensors"
        write_bytes(path, encoded.data, durable=self._durable)
        return path

    def _prune(self, newest: _Encoded) -> None:
        """Remove checkpoints beyond `keep`, now that the newest is whole."""
        self._weights = newest.weights
        self._remove([self.folder / old[4] for old in self._names()[: -self._keep]])

    def _remove(self, files: Sequence[Path]) -> None:
        """Remove checkpoint files, then the parts that no other names. DataError where that fails."""
        try:
            for file in files:
                file.unlink(missing_ok=True)
            left = [file for file in self.folder.glob("*.safetensors") if not file.name.startswith(".")]
            known = self._known
            self._known = {f.name: known[f.name] if f.name in known else _parts_of(f) for f in left}
            held = frozenset[str]().union(*self._known.values())
            for part in self._parts.glob("*.safetensors"):
                if part.stem not in held:
                    part.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"cannot remove old checkpoints in {self.folder}: {error.strerror or error}") from error

    def _names(self) -> list[tuple[str, str, str, str, str]]:
        """Return (number, round, stage, hash, file name) of the files, oldest first."""
        matches = (NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted((m[1], m[2], m[3], m[4], m[0]) for m in matches if m is not None)

    def _aside(self, name: str) -> list[Path]:
        matches = (ASIDE.fullmatch(path.name) for path in self.folder.iterdir())
        return [self.folder / m[0] for m in matches if m is not None and m[1] == name]


def look(folder: Path) -> list[tuple[str, str]]:
    """Return the checkpoints in a folder, newest first: file name, and its fault or "".

    Nothing is changed, unlike by a `CheckpointStore`, which is the running agent's alone. DataError where the folder
    cannot be read.
    """
    try:
        names = sorted((path.name for path in folder.iterdir() if NAME.fullmatch(path.name)), reverse=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror or error}") from error
    found: list[tuple[str, str]] = []
    for name in names:
        try:
            read_checkpoint(folder / name)
            found.append((name, ""))
        except DataError as error:
            found.append((name, str(error)))
    return found


def digest(data: bytes) -> str:
    """Return the part of a file's name that vouches for its content."""
    return blake3(data).hexdigest()[:32]


def encode(stored: Stored) -> bytes:
    """Return tensors, values and the names of parts as the bytes of a safetensors file."""
    metadata = {"dimat.checkpoint": FORMAT, "values": json.dumps(dict(stored.values))}
    if stored.parts:
        metadata["parts"] = json.dumps(dict(stored.parts))
    return b"".join(EncodedTensors(stored.tensors, metadata).pieces())


def write_state(path: Path, stored: Stored, *, durable: bool = True) -> None:
    """Write tensors and values as one file, by rename; DataError where it cannot be written."""
    write_bytes(path, encode(stored), durable=durable)


def read_state(source: Path | bytes, what: str = "") -> Stored:
    """Read what `write_state` wrote, or its bytes (`what`: those, for messages).

    DataError where it is missing, damaged or of another format.
    """
    where = what or str(source)
    try:
        with open_tensors(source, where, LONGEST_HEADER) as file:
            metadata, tensors = file.metadata, dict(file)
    except DataError as error:
        raise DataError(f"cannot read checkpoint: {error}") from error
    found = metadata.get("dimat.checkpoint", "none")
    if found not in READ:
        raise DataError(f"{where} is no checkpoint that this dimat reads (format {found}, expected {FORMAT})")
    try:
        values = as_type(dict[str, Any], parse_json(metadata["values"]))
        return Stored(tensors, values, as_type(dict[str, str], parse_json(metadata.get("parts", "{}"))))
    except (ValueError, KeyError) as error:
        raise DataError(f"cannot read checkpoint {where}: {error}") from error


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint file, whose name vouches for its content, and its parts.

    DataError where any of them is missing or damaged.
    """
    expected = path.name.split(".")[-2]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    if digest(data) != expected:
        raise DataError(f"checkpoint {path} is damaged: its content does not match the hash in its name")
    stored = read_state(data, str(path))
    values, tensors = stored.values, dict(stored.tensors)
    try:
        listed = as_type(list[str], values.get("statistics", []))
    except ValueError as error:
        raise DataError(f"cannot read checkpoint {path}: statistics: {error}") from None
    statistics = {AUX + name: _STATISTICS + name for name in listed}
    for part, root in stored.parts.items():
        for name, tensor in _read_part(path, part, root).items():
            prefixed = statistics.get(name, _MODEL + name) if part == "weights" else _PREFIXES.get(part, "") + name
            tensors[prefixed] = tensor

    def under(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    try:
        return Checkpoint(
            machine=MachineState.from_dict(as_type(dict, values["machine"])),
            trainer=TrainerState(under("trainer/"), dict(values["trainer"])),
            schema=str(values["schema"]),
            method_tensors=under("method/"),
            method_values=dict(values["method"]),
            statistics=under(_STATISTICS),
            data=dict(values.get("data", {})),
            norms=dict(values.get("norms", {})),
            doubt=(int(values.get("doubt", (0, 0))[0]), int(values.get("doubt", (0, 0))[1])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"cannot read checkpoint {path}: {type(error).__name__}: {error}") from error


def _read_part(checkpoint: Path, part: str, root: str) -> dict[str, Tensor]:
    if not root.isalnum():
        raise DataError(f"checkpoint {checkpoint} is damaged: {root!r} is no address of its {part}")
    path = checkpoint.parent / "parts" / f"{root}.safetensors"
    try:
        if checksum_file(path).root != root:
            raise DataError(
                f"checkpoint {checkpoint} is damaged: the content of its {part}, {path}, does not match "
                "the hash in its name"
            )
    except FileNotFoundError:
        raise DataError(f"checkpoint {checkpoint} was not written to the end: its {part}, {path}, is missing") from None
    except OSError as error:
        raise DataError(
            f"cannot read the {part} of checkpoint {checkpoint}, {path}: {error.strerror or error}"
        ) from error
    with open_tensors(path, "", LONGEST_HEADER) as file:
        return dict(file)


def _parts_of(path: Path) -> frozenset[str]:
    """Return the addresses of a checkpoint file's parts; none of a file that is damaged, which nobody will read."""
    try:
        with path.open("rb") as file:
            header = parse_header(file, str(path))
        return frozenset(parse_json(header.metadata.get("parts", "{}")).values())
    except (DataError, ValueError, AttributeError, FileNotFoundError):
        return frozenset()


def _check_whose(path: Path, checkpoint: Checkpoint, run: str, agent: str, schema: str) -> None:
    machine = checkpoint.machine
    if (machine.run, machine.agent) != (run, agent):
        raise DataError(
            f"checkpoint {path} is of agent {machine.agent!r} in run {machine.run!r}, this is agent {agent!r} "
            f"in run {run!r}; choose another folder"
        )
    if checkpoint.schema != schema:
        raise DataError(
            f"checkpoint {path} is of another architecture ({checkpoint.schema[:12]}…) than the task's model "
            f"({schema[:12]}…); restore the model's settings or choose another folder"
        )
