"""Writes safetensors tensor by tensor: first the header, as sizes are known, then the data.

Everything is written under temporary names and renamed when it is complete and on the disk, so that a full disk, an
error or a lost process leaves nothing incomplete under the final name. `Scratch` stores a merge's temporary tensors.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import torch
from torch import Tensor

from dimat.errors import ConfigError, DataError, MergeError
from dimat.merge.natures import is_constant
from dimat.merge_files.files import ADAPTER, DIFFUSERS, WEIGHTS, ModelFiles
from dimat.weights.durable import sync_folder
from dimat.weights.header import NAMES, TensorInfo, compose_header

SMALL = 1 << 20
"""Bytes up to which a tensor stays in memory."""

NO_ROOM_KEPT = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
"""Errors of file systems that cannot reserve space; writing shows whether there is enough."""


def lay_out(infos: Mapping[str, TensorInfo], shard_bytes: int | None, name: str = WEIGHTS) -> dict[str, list[str]]:
    """Return the tensors of each file: one file `name`, or shards of up to `shard_bytes` if they need more than one (a
    larger tensor has a shard of its own). Tensors keep their order."""
    groups: list[list[str]] = [[]]
    size = 0
    for tensor, info in infos.items():
        if shard_bytes is not None and groups[-1] and size + info.bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += info.bytes
    if len(groups) == 1:
        return {name: groups[0]}
    stem = name.removesuffix(".safetensors")
    return {f"{stem}-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


class TensorFile:
    """One safetensors file that is being written. Tensors may be put in any order."""

    def __init__(self, path: Path, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> None:
        self.path = path
        self._infos = infos
        self._missing = set(infos)
        head, self._starts = compose_header(infos, metadata)
        self._file: IO[bytes] = path.open("xb")
        try:
            set_room_aside(self._file.fileno(), len(head) + sum(info.bytes for info in infos.values()))
            self._file.write(head)
        except BaseException:
            self.close()
            raise

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; its shape must be the announced one, its type becomes the announced one."""
        info = self._infos[name]
        if tuple(tensor.shape) != info.shape:
            raise DataError(f"the method made tensor {name!r} {[*tensor.shape]}, its inputs are {info}")
        self._missing.discard(name)
        if tensor.numel():
            flat = tensor.detach().to("cpu", info.dtype).contiguous().reshape(-1)
            self._file.seek(self._starts[name])
            self._file.write(flat.view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Flush everything to the disk; DataError if a tensor is missing."""
        if self._missing:
            raise DataError(f"the method made no tensor {min(self._missing)!r}; {self.path} is not written")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        self._file.close()


class Output:
    """A merged model that is being written: a file (`path` ends in .safetensors), or a folder of files.

        with Output(path, layout, infos, metadata, overwrite=False) as output:
            output.put(name, tensor)     # each tensor once
            output.add("README.md", b"…")   # folders only

    Leaving the block renames the written files to `path`; leaving it by an error removes them.
    Raises ConfigError if `path` is there and may not be replaced, DataError if writing fails.
    """

    def __init__(
        self,
        path: Path,
        layout: Mapping[str, Sequence[str]],
        infos: Mapping[str, TensorInfo],
        metadata: Mapping[str, str],
        *,
        overwrite: bool,
        finite: bool = True,
    ) -> None:
        self._finite = finite
        check_output(path, overwrite)
        self.single = is_file_name(path)
        # a link to a folder stays, and what it leads to is written; one to a file is replaced, not the file behind it
        self._named = path
        self.path = path = path if self.single else real_path(path)
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._layout = layout
        self._infos = infos
        self._metadata = metadata
        self._files: dict[str, TensorFile] = {}
        self._owner: dict[str, TensorFile] = {}

    def __enter__(self) -> Output:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.single:
                self._temporary.mkdir()
            for file, names in self._layout.items():
                place = self._temporary if self.single else self._temporary / file
                opened = TensorFile(place, {name: self._infos[name] for name in names}, self._metadata)
                self._files[file] = opened
                self._owner |= dict.fromkeys(names, opened)
        except BaseException as error:
            self._discard()
            raise self._explained(error) from error
        return self

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor. Raises MergeError where its type cannot hold values, if all are to stay `finite`."""
        written = tensor.detach().to(self._infos[name].dtype)
        if self._finite and written.dtype != tensor.dtype and written.is_floating_point():
            lost = int((tensor.isfinite() & ~written.to(tensor.dtype).isfinite()).sum())
            if lost and not is_constant(name, tensor):
                raise MergeError(
                    f"tensor {name!r} holds {lost:,} values that are too large for {NAMES[written.dtype]}: write it in "
                    "a wider type, by --dtype bf16 or fp32"
                )
        self._owner[name].put(name, written)

    def add(self, name: str, data: bytes) -> None:
        """Write a small file into the folder."""
        with (self._temporary / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is not None:
                raise error
            for file in self._files.values():
                file.finish()
            if len(self._layout) > 1:
                stem = next(iter(self._layout)).rsplit("-", 3)[0]
                self.add(f"{stem}.safetensors.index.json", self._index())
            self._publish()
        except BaseException as fault:
            self._discard()
            if isinstance(fault, OSError):
                raise self._explained(fault) from fault
            if fault is not error:
                raise

    def _index(self) -> bytes:
        where = {name: file for file, names in self._layout.items() for name in names}
        size = sum(self._infos[name].bytes for name in where)
        return (json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2) + "\n").encode()

    def _publish(self) -> None:
        """Rename the complete output to its final name."""
        if self.single or not self.path.exists() or not any(self.path.iterdir()):
            self._temporary.replace(self.path)
        else:  # the old folder steps aside; what it has besides weights and is not written anew moves over
            former = self.path.with_name(f".{self.path.name}.{os.getpid()}.old")
            self.path.rename(former)
            self._temporary.rename(self.path)
            for entry in former.iterdir():
                stale = entry.suffix == ".safetensors" or entry.name.endswith(".index.json")
                if not stale and not (self.path / entry.name).exists():
                    entry.rename(self.path / entry.name)
            shutil.rmtree(former)
        sync_folder(self.path.parent)

    def _discard(self) -> None:
        for file in self._files.values():
            file.close()
        if self.single:
            self._temporary.unlink(missing_ok=True)
        else:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _explained(self, error: BaseException) -> BaseException:
        if not isinstance(error, OSError):
            return error
        need = sum(self._infos[name].bytes for names in self._layout.values() for name in names)
        return DataError(
            f"cannot write {self._named} ({need:,} bytes): {error.strerror or error}; nothing is left under that name"
        )


def is_file_name(path: Path) -> bool:
    """Tell whether an output is one file (else a folder)."""
    return path.suffix == ".safetensors"


def weights_name(adapter: bool, like: ModelFiles) -> str:
    """Return the name of the weights file in a folder: the one that the library which wrote the model looks for."""
    stem = DIFFUSERS.removesuffix(".safetensors")
    if not adapter and like.folder is not None and all(file.name.startswith(stem) for file in like.files):
        return DIFFUSERS
    return ADAPTER if adapter else WEIGHTS


def check_apart(path: Path, inputs: Sequence[Path]) -> None:
    """Raise ConfigError where an output is one of the inputs, or a folder whose weights, that it replaces, are some."""
    out = real_path(path)
    for given in inputs:
        place = given.resolve()
        if place == out:
            raise ConfigError(f"{path} is one of the inputs; write the merged model elsewhere")
        if not is_file_name(path) and place.parent == out and place.is_file():
            raise ConfigError(f"{path} holds the input {given}, which it would replace; write elsewhere")


def real_path(path: Path) -> Path:
    """Return where symbolic links lead; ConfigError where they lead in a circle."""
    try:
        return path.resolve()
    except (RuntimeError, OSError):
        raise ConfigError(
            f"{path} cannot be followed: its symbolic links lead in a circle; give another path"
        ) from None


def check_output(path: Path, overwrite: bool) -> None:
    """Raise ConfigError if an output exists and may not be replaced, or is of the other kind."""
    if is_file_name(path):
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; name a folder without .safetensors, or another file")
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} exists; replace it with --overwrite")
    elif path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file; a model file's name ends in .safetensors")
    elif path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ConfigError(f"{path} exists and is not empty; replace the model in it with --overwrite")


def set_room_aside(descriptor: int, size: int) -> None:
    """Reserve the space on the disk now, so that a disk that is too full fails at once."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in NO_ROOM_KEPT:
            raise


class Scratch:
    """Stores tensors temporarily in a folder. Their files are unlinked at once, so that nothing is left behind, even if
    the process dies; the space is free again when the last tensor in a file is gone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the same numbers on disk; DataError if the disk is full. Small and complex tensors, and those on other
        devices than the CPU, are returned unchanged."""
        size = tensor.numel() * tensor.element_size()
        if size <= SMALL or tensor.is_complex() or tensor.device.type != "cpu":
            return tensor
        try:
            descriptor, name = tempfile.mkstemp(prefix=".dimat-", dir=self._folder)
            try:
                # the room is taken first: writing to a mapped file on a full disk would kill the process
                os.ftruncate(descriptor, size)
                set_room_aside(descriptor, size)
                mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
            finally:
                os.close(descriptor)
                os.unlink(name)
        except OSError as error:
            raise DataError(
                f"cannot store {size:,} bytes of the merge in {self._folder}: {error.strerror or error}"
            ) from error
        return mapped.copy_(tensor.reshape(-1)).view(tensor.shape)
