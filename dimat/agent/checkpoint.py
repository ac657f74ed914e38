"""An agent's state as one file: named tensors and plain values in a safetensors payload, without pickle.

Files appear by rename, so a reader sees the old state or the new one, never half of one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as encode_safetensors
from torch import Tensor

from dimat.errors import DataError
from dimat.snapshot import write_bytes

FORMAT = "1"

Value = int | float | str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint file holds: tensors by name, and plain values by name."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Value]


def write_checkpoint(path: Path, checkpoint: Checkpoint, *, durable: bool = True) -> None:
    """Write a checkpoint; DataError where it cannot be written."""
    metadata = {"dimat.checkpoint": FORMAT, "values": json.dumps(dict(checkpoint.values))}
    write_bytes(path, encode_safetensors(dict(checkpoint.tensors), metadata), durable=durable)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what `write_checkpoint` wrote; DataError where it is missing, damaged or of another format."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = cast("dict[str, str]", file.metadata() or {})
            found = metadata.get("dimat.checkpoint", "none")
            if found != FORMAT:
                raise DataError(f"{path} is no checkpoint that this dimat reads (format {found}, expected {FORMAT})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return Checkpoint(tensors, json.loads(metadata["values"]))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"cannot read checkpoint {path}: {error}") from error
