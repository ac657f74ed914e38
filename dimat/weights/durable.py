"""Files that survive power loss: both the file and its folder are flushed to the disk."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

from dimat.errors import DataError

FICLONE = 0x40049409
"""Number of Linux's ioctl that clones a file; elsewhere it fails, and a link is made."""


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that renames in it are durable. Raises OSError."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file under a temporary name, then rename. `durable`: fsync file and folder, to survive power loss.

    DataError on failure.
    """
    write_pieces(path, (data,), durable=durable)


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview], *, durable: bool = True) -> None:
    """Write a file as `write_bytes` does, piece by piece."""
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def _temporary(path: Path) -> Path:
    """Return a name beside `path` that no other thread uses: two may make the same file at once."""
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")


def share_file(source: Path, path: Path, *, durable: bool = True) -> None:
    """Give a file's content another name on the same disk without writing it again; an existing file of that name is
    replaced.

    It makes a clone if the file system has them (FICLONE of Linux: btrfs, XFS), else a hard link, which is made
    read-only, since writing into one would write into both. FileNotFoundError if there is no source, DataError if the
    file cannot be made.
    """
    temporary = _temporary(path)
    try:
        temporary.unlink(missing_ok=True)
        if not _clone(source, temporary, durable=durable):
            try:
                os.link(source, temporary)
                temporary.chmod(0o444)
            except FileNotFoundError:
                raise
            except OSError:  # a file system without links
                shutil.copyfile(source, temporary)
                _sync(temporary)
        temporary.replace(path)
        temporary.unlink(missing_ok=True)  # two links of one file: replacing one by the other does nothing
        if durable:
            sync_folder(path.parent)
    except FileNotFoundError:
        raise
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def _clone(source: Path, path: Path, *, durable: bool) -> bool:
    """Make a file that shares the source's blocks until one of the two is written to; False if that is impossible."""
    with source.open("rb") as file, path.open("wb") as clone:
        try:
            fcntl.ioctl(clone.fileno(), FICLONE, file.fileno())
        except OSError:
            path.unlink()
            return False
        if durable:
            os.fsync(clone.fileno())
    return True
