"""Room on disk for what a merge needs of all tensors at once: files that have no name and are mapped, not read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from dimat.errors import DataError
from dimat.merging.write import set_room_aside

SMALL = 1 << 20
"""Bytes up to which a tensor stays in memory."""


class Scratch:
    """Puts tensors away in a folder. Their files lose their names at once, so that nothing is left behind, whatever
    becomes of the process; the room is free again when the last tensor on a file is gone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the same numbers on disk; DataError where the disk is full. Small and complex tensors, and those of
        other devices than the CPU, are returned as they are."""
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
                f"cannot put {size:,} bytes of the merge away in {self._folder}: {error.strerror or error}"
            ) from error
        return mapped.copy_(tensor.reshape(-1)).view(tensor.shape)
