"""Tensors to safetensors bytes and back, for content that may come from an enemy.

Reading copies one tensor at a time, when it is asked for. Nothing is allocated beyond what the file holds: a header may
take an eighth of it and `SPARE`, and each tensor's claim has to fit its bytes.
"""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from blake3 import blake3
from safetensors.torch import save as encode_safetensors
from torch import Tensor

from dimat.errors import DataError
from dimat.weights.durable import write_bytes
from dimat.weights.header import TensorInfo, compose_header, parse_header, shown

SPARE = 2**20


def longest_header(size: int) -> int:
    """Return how many bytes of a file of `size` its header may take: parsed, they take some twenty times as much."""
    return SPARE + size // 8


class Tensors(Mapping[str, Tensor]):
    """An open safetensors file: tensors by name, each a copy of its own. DataError where one cannot be read."""

    def __init__(self, file: io.BytesIO | io.BufferedReader, where: str) -> None:
        self.where = where
        self._file = file
        self._header = parse_header(file, where, longest_header(file.seek(0, 2)))

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._header.metadata

    def info(self, name: str) -> TensorInfo:
        """Return type and shape of a tensor, without reading it."""
        return self._header.tensors[name]

    def __getitem__(self, name: str) -> Tensor:
        info = self._header.tensors[name]
        raw = torch.empty(info.bytes, dtype=torch.uint8)
        if info.bytes:
            try:
                self._file.seek(self._header.starts[name])
                there = self._file.readinto(raw.numpy().data)
            except OSError as error:
                raise DataError(f"cannot read {self.where}: {error.strerror or error}") from error
            if there != info.bytes:
                raise DataError(f"{self.where} is cut short: tensor {shown(name)} is not whole")
        if info.dtype == torch.bool and bool((raw > 1).any()):
            raise DataError(f"{self.where}: tensor {shown(name)} holds what is neither true nor false")
        return raw.view(info.dtype).reshape(info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._header.tensors)

    def __len__(self) -> int:
        return len(self._header.tensors)


@contextmanager
def open_tensors(source: Path | bytes, what: str) -> Generator[Tensors, None, None]:
    """Open a safetensors file, or its bytes, to read from; DataError where it is none. `what`: bytes, in messages."""
    if isinstance(source, bytes):
        yield Tensors(io.BytesIO(source), what)
        return
    try:
        file = source.open("rb")
    except OSError as error:
        raise DataError(f"cannot read {source}: {error.strerror or error}") from error
    with file:
        yield Tensors(file, str(source))


def join_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes | None:
    """Return tensors on the CPU as the bytes of a safetensors file: equal ones for equal tensors, wherever they lie.
    None where the header would be longer than `longest_header` lets it be: more names than numbers."""
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    head, starts = compose_header(infos, metadata)
    size = len(head) + sum(info.bytes for info in infos.values())
    if len(head) - 8 > longest_header(size):
        return None
    # one copy, from where each tensor lies
    raw = (tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy() for name in starts if infos[name].bytes)
    return b"".join([head, *(part.data for part in raw)])


def encode(weights: Mapping[str, Tensor]) -> bytes:
    """Return a state dict as the bytes of a safetensors file: the same for equal weights, wherever they lie."""
    # safetensors refuses tensors that share memory; views and tied tensors are written out, each under its name
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in weights.items():
        t = tensor.detach().to("cpu").contiguous()
        pointer = t.untyped_storage().data_ptr()
        if pointer in seen or t.untyped_storage().nbytes() != t.numel() * t.element_size():
            t = t.clone(memory_format=torch.contiguous_format)
        seen.add(pointer)
        plain[name] = t
    return encode_safetensors(plain)


def write_weights(path: Path, weights: Mapping[str, Tensor], *, durable: bool = True) -> None:
    """Write a state dict as safetensors under a temporary name, then rename; DataError where that fails."""
    write_bytes(path, encode(weights), durable=durable)


def schema_hash(weights: Mapping[str, Tensor]) -> str:
    """Return a hex blake3 of names, shapes and dtypes: equal for models that can be merged without alignment."""
    lines = [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in sorted(weights.items())]
    return blake3("\n".join(lines).encode()).hexdigest()
