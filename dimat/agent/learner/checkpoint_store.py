"""The folder that keeps an agent's last few checkpoints, and those that were set aside.

Unchanged parts are not written again: checkpoints share them, with each other and with snapshots of the same bytes. A
part stays as long as any checkpoint file in the folder names it, whatever that file is called. So another checkpoint
costs only the space of its new parts:

- `set_aside("training", checkpoint)` keeps one beside the numbered ones, for instance in the middle of a round; the
  next one under that name replaces it, `aside` reads it, `drop` removes it;
- `set_aside("trusted")` keeps the newest numbered one under that name, however many follow.

A damaged checkpoint is passed over for the one before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dimat.agent.learner.checkpoint import (
    MODEL,
    PART_BYTES,
    PREFIXES,
    STATISTICS,
    Checkpoint,
    Stored,
    digest,
    encode,
    parts_of,
    read_checkpoint,
)
from dimat.config.agent import CHECKPOINTS_KEPT
from dimat.errors import DataError
from dimat.merge.shared_statistics import beside
from dimat.weights.durable import share_file, write_bytes
from dimat.weights.snapshot import checksum_pieces, make_folder
from dimat.weights.tensors import EncodedTensors, is_recorded, record_tensors

TRUSTED = "trusted"
"""Name of the checkpoint from before the first doubtful merge."""
NAME = re.compile(r"(\d{9})-(\d{9})-([a-z]+)\.([0-9a-f]{32})\.safetensors")
ASIDE = re.compile(r"([a-z][a-z-]*)\.([0-9a-f]{32})\.safetensors")


@dataclass(frozen=True, slots=True)
class Loaded:
    """The newest readable checkpoint.

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
    """The last `keep` checkpoints of one agent in their own folder, and those that were set aside.

    `durable`: they survive power loss; `elsewhere`: folders of snapshots on the same disk, whose files are shared if
    a part has the same content.
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
        """Write a checkpoint without the state of optimizer and merge method, for which no peer waits. Return a
        function that completes it, None if nothing is left: call it before that state changes, and again if it raised
        DataError.

        From now on a snapshot of these weights may be published. Until it is complete the checkpoint cannot be read:
        a crash in between costs the round, which counts as published. Raises DataError if it cannot be written.
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
        """Give the weights of the checkpoint that was saved last another name; False if they are not in a separate
        file, or not alone in it. Raises DataError if that fails."""
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
        """Return the newest readable checkpoint without a fault, None if none was ever written.

        `fault_of`: why a checkpoint is of no use, or nothing. If one has a fault, the checkpoint set aside as
        `TRUSTED` is used instead, if there is one. Raises DataError if all are damaged, and if it belongs to another
        run, agent or model, naming both.
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
                passed_over.append(f"all checkpoints since the doubtful merge of round {number} are ignored")
                return Loaded(trusted, published, tuple(passed_over))
        if passed_over:
            raise DataError(
                f"no checkpoint in {self.folder} can be read: {passed_over[0]}; restore one from a backup, or remove "
                "the folder to begin as a newcomer"
            )
        return None

    # ── beside the last few ──────────────────────────────────────────────────────────────────────────────────
    def set_aside(self, name: str, checkpoint: Checkpoint | None = None) -> None:
        """Keep a checkpoint, or the newest one, under a name (of letters and "-") until another replaces it.

        Raises DataError if it cannot be written, or if there is none.
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
        """Return the checkpoint that was set aside under a name, None if there is none.

        Raises DataError if it is damaged, or belongs to another run, agent or model.
        """
        path = max(self._aside(name), key=lambda file: file.stat().st_mtime_ns, default=None)
        if path is None:
            return None
        checkpoint = read_checkpoint(path)
        _check_whose(path, checkpoint, run, agent, schema)
        return checkpoint

    def drop(self, name: str) -> None:
        """Remove the checkpoint that was set aside under a name, if any."""
        self._remove(self._aside(name))

    # ── files ────────────────────────────────────────────────────────────────────────────────────────────────
    def _encode(self, checkpoint: Checkpoint) -> _Encoded:
        """Write the part of a checkpoint that holds its weights."""
        tensors = {f"trainer/{name}": tensor for name, tensor in checkpoint.trainer.tensors.items()}
        tensors |= {f"method/{name}": tensor for name, tensor in checkpoint.method_tensors.items()}
        tensors |= {STATISTICS + name: tensor for name, tensor in checkpoint.statistics.items()}
        parts: dict[str, str] = {}
        model = {n.removeprefix(MODEL): t for n, t in tensors.items() if n.startswith(MODEL)}
        candidates = {"weights": beside(model, checkpoint.statistics)}
        for part, prefix in PREFIXES.items():
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
            *((MODEL, STATISTICS) if "weights" in parts else ()),
            *(PREFIXES[p] for p in parts if p in PREFIXES),
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
            "moment_norms": dict(checkpoint.moment_norms),
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
            self._known = {f.name: known[f.name] if f.name in known else parts_of(f) for f in left}
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

    It changes nothing, unlike a `CheckpointStore`, which only the running agent may open. Raises DataError if the
    folder cannot be read.
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
