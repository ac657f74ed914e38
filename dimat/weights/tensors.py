"""Tensors to safetensors bytes and back, for content that may come from an attacker.

Reading copies one tensor at a time, when it is accessed, and writing copies none. No more memory is allocated than the
file's size justifies: a header may take an eighth of it plus `SPARE`, and each tensor's claim must fit its bytes.
"""

from __future__ import annotations

import io
import os
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from dimat.errors import DataError
from dimat.weights.durable import share_file, write_pieces
from dimat.weights.header import NAMES, TensorInfo, compose_header, parse_header, shown
from dimat.weights.snapshot import Payload, checksum_pieces

SPARE = 2**20


def longest_header(size: int) -> int:
    """Return the bytes that the header of a file of `size` may take: parsed, it needs about twenty times as much
    memory."""
    return SPARE + size // 8


class Tensors(Mapping[str, Tensor]):
    """A safetensors file, or its bytes, as tensors by name: each access reads one, and nothing is cached.

    Any thread may read. The file stays open until `close`, or as long as the mapping lives: it can be read even after
    its name is removed. `what`: a name for bytes, in messages; `longest`: most bytes of the header, by default the
    limit for a stranger's (`longest_header`). DataError, naming the file, if it is missing or damaged, or a tensor
    cannot be read.

    dimat has its own reader, because that of safetensors 0.8.0 leaks 32 bytes for each tensor that is read, in a
    process that merges for weeks, and its `in` reads the tensor.
    """

    def __init__(self, source: str | PathLike[str] | bytes, what: str = "", longest: int | None = None) -> None:
        self.where = what if isinstance(source, bytes) else fspath(source)
        self._data = source if isinstance(source, bytes) else None
        try:
            file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb", buffering=0)
        except IsADirectoryError:
            raise DataError(f"{self.where} is a folder: name the safetensors file in it") from None
        except OSError as error:
            raise DataError(f"cannot read {self.where}: {error.strerror or error}") from error
        self._file = file
        self.close = weakref.finalize(self, file.close)
        try:
            size = file.seek(0, 2)
            self._header = parse_header(file, self.where, longest_header(size) if longest is None else longest)
        except OSError as error:
            raise DataError(f"cannot read {self.where}: {error.strerror or error}") from error

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._header.metadata

    def info(self, name: str) -> TensorInfo:
        """Return type and shape of a tensor, without reading it."""
        return self._header.tensors[name]

    def __getitem__(self, name: str) -> Tensor:
        info = self._header.tensors[name]
        raw = torch.empty(info.bytes, dtype=torch.uint8)
        if info.bytes and self._read(raw.numpy().data, self._header.starts[name]) != info.bytes:
            raise DataError(f"{self.where} is cut short: tensor {shown(name)} is not whole")
        if info.dtype == torch.bool and bool((raw > 1).any()):
            raise DataError(f"{self.where}: tensor {shown(name)} holds a value that is neither true nor false")
        return raw.view(info.dtype).reshape(info.shape)

    def __contains__(self, name: object) -> bool:
        return name in self._header.tensors  # without reading the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._header.tensors)

    def __len__(self) -> int:
        return len(self._header.tensors)

    def _read(self, buffer: memoryview, start: int) -> int:
        """Fill a buffer from an offset in the file; return the number of bytes read."""
        if self._data is not None:
            found = memoryview(self._data)[start : start + len(buffer)]
            buffer[: len(found)] = found
            return len(found)
        done = 0
        try:
            while done < len(buffer) and (count := os.preadv(self._file.fileno(), [buffer[done:]], start + done)):
                done += count
        except OSError as error:
            raise DataError(f"cannot read {self.where}: {error.strerror or error}") from error
        return done


@contextmanager
def open_tensors(source: Path | bytes, what: str, longest: int | None = None) -> Generator[Tensors, None, None]:
    """Open a safetensors file, or its bytes, for reading, and close it at the end; see `Tensors`."""
    tensors = Tensors(source, what, longest)
    try:
        yield tensors
    finally:
        tensors.close()


class EncodedTensors:
    """Tensors as the bytes of a safetensors file: equal bytes for equal tensors, on any device.

    The bytes come piece by piece, directly from each tensor: only one that is not contiguous on the CPU is copied, when
    its turn comes. Views, and tensors that share memory, are written in full, each under its name. `bytes`: size of the
    whole file. DataError for a type that no file can hold.
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        self._tensors = tensors
        for name, tensor in tensors.items():
            if tensor.dtype not in NAMES:
                raise DataError(f"tensor {shown(name)} is of type {tensor.dtype}, which no file holds")
        infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        self._head, starts = compose_header(infos, metadata or {})
        self._names = [name for name in starts if infos[name].bytes]
        self.bytes = len(self._head) + sum(info.bytes for info in infos.values())

    @property
    def readable(self) -> bool:
        """Whether the header is short enough for `Tensors`; if not, names take more space than numbers."""
        return len(self._head) - 8 <= longest_header(self.bytes)

    def pieces(self) -> Iterator[memoryview]:
        """Yield the bytes, in order. The tensors must not change meanwhile."""
        yield memoryview(self._head)
        for name in self._names:
            dense = self._tensors[name].detach().to("cpu").resolve_conj().resolve_neg().contiguous()
            yield dense.reshape(-1).view(torch.uint8).numpy().data


def encode(weights: Mapping[str, Tensor]) -> bytes:
    """Return a state dict as the bytes of a safetensors file."""
    return b"".join(EncodedTensors(weights).pieces())


def write_weights(path: Path, weights: Mapping[str, Tensor], *, durable: bool = True) -> None:
    """Write a state dict as safetensors under a temporary name, then rename; DataError on failure."""
    write_pieces(path, EncodedTensors(weights).pieces(), durable=durable)


def record_tensors(
    folder: Path, tensors: Mapping[str, Tensor], *, elsewhere: Sequence[Path] = (), durable: bool = True
) -> Payload:
    """Write tensors as a payload into a store folder, as `record_bytes` does, without a copy of them all.

    `elsewhere`: other store folders on this disk, from which equal content is shared rather than written again.
    """
    encoded = EncodedTensors(tensors)
    payload = checksum_pieces(encoded.pieces())
    path = folder / f"{payload.root}.safetensors"
    if is_recorded(folder, payload):
        return payload
    for other in elsewhere:
        try:
            share_file(other / path.name, path, durable=durable)
        except FileNotFoundError:
            continue
        return payload
    write_pieces(path, encoded.pieces(), durable=durable)
    return payload


def is_recorded(folder: Path, payload: Payload) -> bool:
    """Say whether a payload is in a store folder, by its length; its content is checked when it is read."""
    try:
        return (folder / f"{payload.root}.safetensors").stat().st_size == payload.bytes
    except FileNotFoundError:
        return False


def schema_hash(weights: Mapping[str, Tensor]) -> str:
    """Return a hex blake3 of names, shapes and dtypes: equal for models that can be merged without alignment."""
    lines = [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in sorted(weights.items())]
    return blake3("\n".join(lines).encode()).hexdigest()
