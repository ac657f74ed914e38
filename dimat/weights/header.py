"""The header of a safetensors file, checked before anything is allocated from its claims.

A file is 8 bytes (length of the header, little-endian), the header (JSON: name → dtype, shape, place of the data), and
the data of all tensors, without holes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from dimat.errors import DataError
from dimat.weights.formats import LONGEST, other_format

LONGEST_HEADER = 100 * 2**20
"""Bytes of a header; safetensors itself reads no larger ones."""

MOST_DIMENSIONS = 64
"""Dimensions of a tensor; torch handles no more."""

METADATA = "__metadata__"

CODES: Mapping[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Name of a type in safetensors → type, in the order in which safetensors lays out tensors of these types."""

NAMES = {dtype: code for code, dtype in CODES.items()}
_PLACES = {dtype: place for place, dtype in enumerate(CODES.values())}


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


@dataclass(frozen=True, slots=True)
class Header:
    """`tensors` in the order of their data, their offsets in the file (`starts`), and the file's metadata."""

    tensors: Mapping[str, TensorInfo]
    starts: Mapping[str, int]
    metadata: Mapping[str, str]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file in the order of their data.

    Raises DataError, naming the file, if it cannot be read, is cut short, or claims more than it holds.
    """
    try:
        with path.open("rb") as file:
            return dict(parse_header(file, str(path)).tensors)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def parse_header(file: BinaryIO, where: str, longest: int = LONGEST_HEADER) -> Header:
    """Return the header of an open safetensors file. `where`: the file, for messages; `longest`: bytes of a header.

    Raises DataError as `read_header` does, which names a file of another format, and OSError if the file cannot be
    read.
    """
    size = file.seek(0, 2)
    try:
        return _parsed(file, where, size, longest)
    except DataError:
        file.seek(0)
        if what := other_format(file.read(LONGEST)):
            raise DataError(f"{where} {what}") from None
        raise


def _parsed(file: BinaryIO, where: str, size: int, longest: int) -> Header:
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 10:
        raise DataError(f"{where} is not a safetensors file: it has {size} bytes")
    if length > min(size - 8, longest):
        raise DataError(
            f"{where} is cut short or not a safetensors file: its header claims {length:,} bytes, the file has {size:,}"
        )
    try:
        header: Any = json.loads(file.read(length).decode(), object_pairs_hook=_table)
        "".join(header).encode()  # half a pair of surrogates is no text, and cannot be written again
    except (ValueError, TypeError, RecursionError):
        raise DataError(f"{where} is not a safetensors file: its header is not JSON, or no table") from None
    if not isinstance(header, dict):
        raise DataError(f"{where} is not a safetensors file: its header is no table")
    return _checked(where, cast("dict[str, Any]", header), size - 8 - length, 8 + length)


def compose_header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return the beginning of a safetensors file, up to its first tensor, and the offset of each tensor in the file."""
    header: dict[str, object] = {METADATA: {**metadata}} if metadata else {}
    places: dict[str, int] = {}
    end = 0
    # as safetensors itself writes them, to the byte: wide types first, so that each lies at a multiple of its width
    for name in sorted(infos, key=lambda name: (_PLACES[infos[name].dtype], name)):
        info = infos[name]
        places[name] = end
        end += info.bytes
        header[name] = {"dtype": NAMES[info.dtype], "shape": [*info.shape], "data_offsets": [places[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + place for name, place in places.items()}


def shown(name: str) -> str:
    """Return a tensor's name for a message: in a stranger's file it may be of any length."""
    return repr(name if len(name) <= 200 else name[:200] + "…")


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name is there twice")
    return table


def _possible(shape: list[Any], start: Any, end: Any) -> bool:
    """Say whether these numbers, and the number of elements, fit into 64 bits."""
    small = all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, end))
    return small and len(shape) <= MOST_DIMENSIONS and prod(max(n, 1) for n in shape) < 2**63


def _checked(where: str, header: Mapping[str, Any], size: int, begin: int) -> Header:
    """Return a header whose tensors fill the file's data, `size` bytes from `begin` on, without holes."""
    places: list[tuple[int, int, str, TensorInfo]] = []
    metadata: dict[str, str] = {}
    for name, entry in header.items():
        if name == METADATA:
            if not isinstance(entry, dict) or not all(
                isinstance(v, str) for v in cast("dict[str, Any]", entry).values()
            ):
                raise DataError(f"{where}: the header's metadata are malformed")
            metadata = cast("dict[str, str]", entry)
            continue
        match entry:
            case {"dtype": str(code), "shape": [*shape], "data_offsets": [start, end]} if _possible(shape, start, end):
                if code not in CODES:
                    known = ", ".join(CODES)
                    raise DataError(
                        f"{where}: tensor {shown(name)} is of type {code[:20]}, which is not merged (known: {known})"
                    )
                info = TensorInfo(CODES[code], tuple(shape))
            case _:
                raise DataError(f"{where}: the header's entry of tensor {shown(name)} is malformed")
        if end - start != info.bytes:
            raise DataError(
                f"{where}: tensor {shown(name)} claims to be {info}, which does not fit its {end - start} bytes"
            )
        places.append((start, end, name, info))
    places.sort(key=lambda place: place[:2])
    reached = 0
    for start, end, name, _ in places:
        if start != reached:
            raise DataError(f"{where}: the data of tensor {shown(name)} overlap others, or leave a hole")
        reached = end
    if reached != size:
        state = "cut short" if reached > size else "too long"
        raise DataError(f"{where} is {state}: its tensors take {reached:,} bytes, the file has {size:,} for them")
    tensors = {name: info for _, _, name, info in places}
    return Header(tensors, {name: begin + start for start, _, name, _ in places}, metadata)
