"""Files that survive power loss: the file and its folder are both flushed to the disk."""

from __future__ import annotations

import os
from pathlib import Path

from dimat.errors import DataError


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk: names that were given by rename hold after that. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file under a temporary name, then rename. `durable`: fsync file and folder, to survive power loss."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
