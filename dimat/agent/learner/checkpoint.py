"""Checkpoints: an agent's whole state in one file, and the folder that keeps the last few.

A checkpoint is plain tensors and plain values in a safetensors file, without pickle. Files appear by rename, after
fsync, and carry the hash of their content in their name, so that a reader sees a whole checkpoint or knows that it
does not. A damaged one is passed over for the one before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as encode_safetensors
from torch import Tensor

from dimat.agent.protocol.state import MachineState
from dimat.config.agent import CHECKPOINTS_KEPT
from dimat.errors import DataError
from dimat.train.trainer import TrainerState
from dimat.weights.durable import write_bytes

FORMAT = "2"
NAME = re.compile(r"(\d{9})-(\d{9})-([a-z]+)\.([0-9a-f]{32})\.safetensors")

Value = int | float | str


@dataclass(frozen=True, slots=True)
class Stored:
    """Tensors by name, and plain values by name, as they lie in a file."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An agent at the end of a step of its round.

    `machine`: the round machine (round, basis, newest snapshot, push-sum weight, peers' offers); `trainer`: weights,
    optimizer, random streams, position in the data; `method_tensors`, `method_values`: what the merge method carries
    from merge to merge; `schema`: hash of the model's tensor names, shapes and types; `statistics`: what the merge to
    come rests on beside weights, as it was published with them (stage "trained").
    """

    machine: MachineState
    trainer: TrainerState
    schema: str
    method_tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    method_values: Mapping[str, Value] = field(default_factory=dict[str, Value])
    statistics: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True, slots=True)
class Loaded:
    """The newest checkpoint that can be read.

    `published`: the last round that a checkpoint of stage "trained" was ever made for, readable or not; `passed_over`:
    why newer ones could not be read.
    """

    checkpoint: Checkpoint
    published: int
    passed_over: tuple[str, ...] = ()


class CheckpointStore:
    """The last `keep` checkpoints of one agent in a folder of their own.

    `durable`: they survive power loss.
    """

    def __init__(self, folder: Path, keep: int = CHECKPOINTS_KEPT, *, durable: bool = True) -> None:
        self.folder = folder
        self._keep = keep
        self._durable = durable
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left_behind in folder.glob(".*.tmp"):
                left_behind.unlink()
        except OSError as error:
            raise DataError(f"cannot make the checkpoint folder {folder}: {error.strerror or error}") from error

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, then remove those beyond `keep`.

        DataError where it cannot be written.
        """
        machine, trainer = checkpoint.machine, checkpoint.trainer
        tensors = {f"trainer/{name}": tensor for name, tensor in trainer.tensors.items()}
        tensors |= {f"method/{name}": tensor for name, tensor in checkpoint.method_tensors.items()}
        tensors |= {f"statistics/{name}": tensor for name, tensor in checkpoint.statistics.items()}
        values = {
            "machine": machine.to_dict(),
            "trainer": dict(trainer.values),
            "method": dict(checkpoint.method_values),
            "schema": checkpoint.schema,
        }
        data = encode(Stored(tensors, values))
        names = self._names()
        number = int(names[-1][0]) + 1 if names else 1
        path = self.folder / f"{number:09d}-{machine.round:09d}-{machine.stage}.{digest(data)}.safetensors"
        write_bytes(path, data, durable=self._durable)
        for old in names[: max(len(names) + 1 - self._keep, 0)]:
            (self.folder / old[4]).unlink(missing_ok=True)
        return path

    def newest(self, run: str, agent: str, schema: str) -> Loaded | None:
        """Return the newest checkpoint that can be read, None where none was ever written.

        Raises DataError where all are damaged, and where it is another run's, agent's or model's, naming both.
        """
        names = self._names()
        passed_over: list[str] = []
        published = max((int(name[1]) for name in names if name[2] == "trained"), default=0)
        for name in reversed(names):
            path = self.folder / name[4]
            try:
                checkpoint = _decode(path, name[3])
            except DataError as error:
                passed_over.append(str(error))
                continue
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
            return Loaded(checkpoint, published, tuple(passed_over))
        if passed_over:
            raise DataError(
                f"no checkpoint in {self.folder} can be read: {passed_over[0]}; restore one from a backup, or remove "
                "the folder to begin as a newcomer"
            )
        return None

    def _names(self) -> list[tuple[str, str, str, str, str]]:
        """Return (number, round, stage, hash, file name) of the files, oldest first."""
        matches = (NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted((m[1], m[2], m[3], m[4], m[0]) for m in matches if m is not None)


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
        match = NAME.fullmatch(name)
        assert match is not None
        try:
            _decode(folder / name, match[4])
            found.append((name, ""))
        except DataError as error:
            found.append((name, str(error)))
    return found


def digest(data: bytes) -> str:
    """Return the part of a file's name that vouches for its content."""
    return blake3(data).hexdigest()[:32]


def encode(stored: Stored) -> bytes:
    """Return tensors and values as the bytes of a safetensors file."""
    return encode_safetensors(
        dict(stored.tensors), {"dimat.checkpoint": FORMAT, "values": json.dumps(dict(stored.values))}
    )


def write_state(path: Path, stored: Stored, *, durable: bool = True) -> None:
    """Write tensors and values as one file, by rename; DataError where it cannot be written."""
    write_bytes(path, encode(stored), durable=durable)


def read_state(path: Path) -> Stored:
    """Read what `write_state` wrote.

    DataError where it is missing, damaged or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = cast("dict[str, str]", file.metadata() or {})
            found = metadata.get("dimat.checkpoint", "none")
            if found != FORMAT:
                raise DataError(f"{path} is no checkpoint that this dimat reads (format {found}, expected {FORMAT})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return Stored(tensors, json.loads(metadata["values"]))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"cannot read checkpoint {path}: {error}") from error


def _decode(path: Path, expected: str) -> Checkpoint:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    if digest(data) != expected:
        raise DataError(f"checkpoint {path} is damaged: its content does not match the hash in its name")
    stored = read_state(path)
    values = stored.values

    def under(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in stored.tensors.items() if n.startswith(prefix)}

    try:
        return Checkpoint(
            machine=MachineState.from_dict(values["machine"]),
            trainer=TrainerState(under("trainer/"), dict(values["trainer"])),
            schema=str(values["schema"]),
            method_tensors=under("method/"),
            method_values=dict(values["method"]),
            statistics=under("statistics/"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"cannot read checkpoint {path}: {type(error).__name__}: {error}") from error
