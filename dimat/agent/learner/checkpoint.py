"""A checkpoint: an agent's whole state, and the files that hold it.

It is plain tensors and plain values in a safetensors file, without pickle. Files appear by rename, after fsync, and
have the hash of their content in their name, so that a reader sees a whole checkpoint or knows that it does not.

Large state is in parts, separate safetensors files in `parts/`, which the checkpoint names by the address of
their content: `weights` (with the statistics beside them: the bytes of a snapshot), `optimizer`, `method`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3
from torch import Tensor

from dimat.agent.protocol.state import MachineState
from dimat.errors import DataError
from dimat.merge.shared_statistics import AUX
from dimat.reading import as_type, parse_json
from dimat.train.base import TrainerState, Value
from dimat.weights.durable import write_bytes
from dimat.weights.header import LONGEST_HEADER, parse_header
from dimat.weights.snapshot import checksum_file
from dimat.weights.tensors import EncodedTensors, open_tensors

FORMAT = "3"
READ = ("2", FORMAT)
"""Formats that are read: in the first of them all tensors lay in the checkpoint's own file."""
PART_BYTES = 16 * 2**10
"""Tensors that take less stay in the checkpoint's own file."""
PREFIXES = {"optimizer": "trainer/optimizer/", "method": "method/"}
MODEL, STATISTICS = "trainer/model/", "statistics/"


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
    optimizer, random streams, position in the data; `method_tensors`, `method_values`: the merge method's state from
    merge to merge; `schema`: hash of the model's tensor names, shapes and types; `statistics`: those that the next
    merge needs, as published with the weights (stage "trained"); `data`: the data that it trained on
    (`own_data.describe_data`), empty if the user's loop reads them and in older checkpoints; `norms`: of each
    tensor after own training (`dimat.merge.growth`); `doubt`: rounds of the first and last doubtful
    merge, 0 for none; `moment_norms`: as `norms`, of the optimizer's moments if they are merged.
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
    moment_norms: Mapping[str, float] = field(default_factory=dict[str, float])


def digest(data: bytes) -> str:
    """Return the hash of a file's content, the part of its name that vouches for it."""
    return blake3(data).hexdigest()[:32]


def encode(stored: Stored) -> bytes:
    """Return tensors, values and the names of parts as the bytes of a safetensors file."""
    metadata = {"dimat.checkpoint": FORMAT, "values": json.dumps(dict(stored.values))}
    if stored.parts:
        metadata["parts"] = json.dumps(dict(stored.parts))
    return b"".join(EncodedTensors(stored.tensors, metadata).pieces())


def write_state(path: Path, stored: Stored, *, durable: bool = True) -> None:
    """Write tensors and values as one file, by rename; raises DataError if it cannot be written."""
    write_bytes(path, encode(stored), durable=durable)


def read_state(source: Path | bytes, what: str = "") -> Stored:
    """Read a file of `write_state`, or its bytes (`what`: their name, for messages).

    Raises DataError if it is missing, damaged or of another format.
    """
    where = what or str(source)
    try:
        with open_tensors(source, where, LONGEST_HEADER) as file:
            metadata, tensors = file.metadata, dict(file)
    except DataError as error:
        raise DataError(f"cannot read checkpoint: {error}") from error
    found = metadata.get("dimat.checkpoint", "none")
    if found not in READ:
        raise DataError(f"{where} is not a checkpoint that this dimat reads (format {found}, expected {FORMAT})")
    try:
        values = as_type(dict[str, Any], parse_json(metadata["values"]))
        return Stored(tensors, values, as_type(dict[str, str], parse_json(metadata.get("parts", "{}"))))
    except (ValueError, KeyError) as error:
        raise DataError(f"cannot read checkpoint {where}: {error}") from error


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint file, whose name has the hash of its content, and its parts.

    Raises DataError if any of them is missing or damaged.
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
    statistics = {AUX + name: STATISTICS + name for name in listed}
    for part, root in stored.parts.items():
        for name, tensor in _read_part(path, part, root).items():
            prefixed = statistics.get(name, MODEL + name) if part == "weights" else PREFIXES.get(part, "") + name
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
            statistics=under(STATISTICS),
            data=dict(values.get("data", {})),
            norms=dict(values.get("norms", {})),
            doubt=(int(values.get("doubt", (0, 0))[0]), int(values.get("doubt", (0, 0))[1])),
            moment_norms=dict(values.get("moment_norms", {})),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"cannot read checkpoint {path}: {type(error).__name__}: {error}") from error


def _read_part(checkpoint: Path, part: str, root: str) -> dict[str, Tensor]:
    if not root.isalnum():
        raise DataError(f"checkpoint {checkpoint} is damaged: {root!r} is not an address of its {part}")
    path = checkpoint.parent / "parts" / f"{root}.safetensors"
    try:
        if checksum_file(path).root != root:
            raise DataError(
                f"checkpoint {checkpoint} is damaged: the content of its {part}, {path}, does not match "
                "the hash in its name"
            )
    except FileNotFoundError:
        raise DataError(f"checkpoint {checkpoint} was not written completely: its {part}, {path}, is missing") from None
    except OSError as error:
        raise DataError(
            f"cannot read the {part} of checkpoint {checkpoint}, {path}: {error.strerror or error}"
        ) from error
    with open_tensors(path, "", LONGEST_HEADER) as file:
        return dict(file)


def parts_of(path: Path) -> frozenset[str]:
    """Return the addresses of a checkpoint file's parts; none of a file that is damaged, which nobody will read."""
    try:
        with path.open("rb") as file:
            header = parse_header(file, str(path))
        return frozenset(parse_json(header.metadata.get("parts", "{}")).values())
    except (DataError, ValueError, AttributeError, FileNotFoundError):
        return frozenset()
