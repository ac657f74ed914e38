"""The header of a safetensors file, read and checked before anything is allocated from what it claims.

A file is 8 bytes (length of the header, little-endian), the header (JSON: name → dtype, shape, place of the data), and
the data of all tensors, without holes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch

from dimat.errors import DataError

LONGEST_HEADER = 100 * 2**20
"""Bytes; safetensors itself reads no longer ones."""

METADATA = "__metadata__"

CODES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Name of a type in safetensors → type."""

NAMES = {dtype: code for code, dtype in CODES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{NAMES[self.dtype]}{[*self.shape]}"


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file in the order of their data.

    Raises DataError, naming the file, where it cannot be read, is cut short, or claims what it does not hold.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 10:
                raise DataError(f"{path} is not a safetensors file: it has {size} bytes")
            if length > min(size - 8, LONGEST_HEADER):
                raise DataError(
                    f"{path} is cut short or not a safetensors file: its header claims {length:,} bytes, "
                    f"the file has {size:,}"
                )
            text = file.read(length)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        header: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{path} is not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise DataError(f"{path} is not a safetensors file: its header is no table")
    return _checked(path, cast("dict[str, Any]", header), size - 8 - length)


def _checked(path: Path, header: Mapping[str, Any], size: int) -> dict[str, TensorInfo]:
    """Return the tensors of a header whose data, of `size` bytes, they fill without holes."""
    places: list[tuple[int, int, str, TensorInfo]] = []
    for name, entry in header.items():
        if name == METADATA:
            continue
        match entry:
            case {"dtype": str(code), "shape": [*shape], "data_offsets": [int(start), int(end)]} if all(
                type(n) is int and n >= 0 for n in shape
            ):
                if code not in CODES:
                    known = ", ".join(CODES)
                    raise DataError(f"{path}: tensor {name!r} is of type {code}, which is not merged (known: {known})")
                info = TensorInfo(CODES[code], tuple(shape))
            case _:
                raise DataError(f"{path}: the header's entry of tensor {name!r} is malformed")
        if end - start != info.bytes or start < 0:
            raise DataError(f"{path}: tensor {name!r} claims to be {info}, which does not fit its {end - start} bytes")
        places.append((start, end, name, info))
    places.sort(key=lambda place: place[:2])
    reached = 0
    for start, end, name, _ in places:
        if start != reached:
            raise DataError(f"{path}: the data of tensor {name!r} overlap others, or leave a hole")
        reached = end
    if reached != size:
        state = "cut short" if reached > size else "too long"
        raise DataError(f"{path} is {state}: its tensors take {reached:,} bytes, the file has {size:,} for them")
    return {name: info for _, _, name, info in places}
