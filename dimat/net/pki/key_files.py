"""Reads and writes files of keys and certificates; only a private key's owner can read it."""

from __future__ import annotations

import os
import stat
import struct
import tempfile
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dimat.errors import DataError, SecurityError
from dimat.net.limits import MAX_KEY_FILE_BYTES
from dimat.net.pki.certificates import is_p256
from dimat.weights.durable import sync_folder

PRIVATE = 0o600
PUBLIC = 0o644

# Linux keeps a POSIX ACL in this attribute: its version, then entries of kind, rights and user or group
ATTRIBUTE = "system.posix_acl_access"
VERSION = 2
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
"""Kinds of entries: the owner, a named user, the file's group, a named group, the mask, everybody else."""


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a private key (PEM, P-256, no passphrase).

    Raises SecurityError for any other file, and if users other than its owner can access it.
    """
    data = read_file(path, private=True)
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except TypeError as error:
        raise SecurityError(
            f"{path} is locked with a passphrase; an agent that starts by itself cannot open it"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SecurityError(f"{path} is not a private key in PEM; put back the right file, or make new keys") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not is_p256(key):
        raise SecurityError(f"{path} is not a P-256 key; make one with `dimat keys`")
    return key


def read_file(path: Path, *, private: bool = False) -> bytes:
    """Read a small file.

    Raises SecurityError if it cannot be read, or if it is `private` and other users have any right to it.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if private and mode & 0o077 and not only_ours(file.fileno(), mode):
                raise SecurityError(f"{path} is open to others (mode {mode:04o}); run: chmod 600 {path}")
            data = file.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise SecurityError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > MAX_KEY_FILE_BYTES:
        raise SecurityError(f"{path} is too long to be a key or certificate")
    return data


def write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Write a private key (PEM) that only its owner can read."""
    form = serialization.PrivateFormat.PKCS8
    write_file(path, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()), PRIVATE)


def write_file(path: Path, data: bytes, mode: int) -> None:
    """Write a file atomically: after a power loss it is complete or absent.

    Raises DataError if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600 from the start
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                os.fchmod(file.fileno(), mode)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def only_ours(descriptor: int, mode: int) -> bool:
    """Return whether an open file's ACL grants rights to its owner, this process's user and root alone.

    False if it has no ACL, or one in another format; then its `mode` decides.
    """
    if mode & 0o007 or not hasattr(os, "getxattr"):
        return False
    try:
        data = os.getxattr(descriptor, ATTRIBUTE)
    except OSError:  # no list, or a file system without any
        return False
    if len(data) % 8 != 4 or struct.unpack_from("<I", data)[0] != VERSION:
        return False
    entries: list[tuple[int, int, int]] = list(struct.iter_unpack("<HHI", data[4:]))
    us = (0, os.geteuid())
    return all(
        not rights or kind in (USER_OBJ, MASK) or (kind == USER and user in us) for kind, rights, user in entries
    )
