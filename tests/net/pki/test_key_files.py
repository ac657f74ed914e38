"""Who may read a file with an access list. Reference: acl(5), by lists that the kernel itself keeps."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from dimat.net.pki.key_files import ATTRIBUTE, GROUP, GROUP_OBJ, MASK, OTHER, USER, USER_OBJ, only_ours

NOBODY = 0xFFFFFFFF
US, ANOTHER = os.geteuid(), os.geteuid() + 1234


def look(file: Path, *entries: tuple[int, int, int]) -> bool:
    """Give a file of mode 0400 these entries besides the owner's and the mask, and look at it."""
    every = sorted([(USER_OBJ, 4, NOBODY), (MASK, 4, NOBODY), *entries])
    data = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in every)
    file.write_bytes(b"secret")
    try:
        os.setxattr(file, ATTRIBUTE, data)
    except OSError as error:
        pytest.skip(f"no access lists in {file.parent}: {error}")
    mode = file.stat().st_mode & 0o777
    assert mode & 0o040  # the mask shows as the group's right
    with file.open("rb") as opened:
        return only_ours(opened.fileno(), mode)


def test_who_is_let_in(tmp_path: Path) -> None:
    """The owner and this process's user may; a group, a named group, another user and all others may not."""
    file = tmp_path / "key"
    closed = ((GROUP_OBJ, 0, NOBODY), (OTHER, 0, NOBODY))
    assert look(file, *closed)
    assert look(file, (USER, 4, US), *closed)
    assert look(file, (USER, 0, ANOTHER), *closed)
    assert not look(file, (USER, 4, ANOTHER), *closed)
    assert not look(file, (USER, 4, US), (GROUP, 4, ANOTHER), *closed)
    assert not look(file, (GROUP_OBJ, 4, NOBODY), (OTHER, 0, NOBODY))
    assert not look(file, (GROUP_OBJ, 0, NOBODY), (OTHER, 4, NOBODY))


def test_a_file_without_a_list(tmp_path: Path) -> None:
    """Its mode says it all."""
    file = tmp_path / "key"
    file.write_bytes(b"secret")
    file.chmod(0o640)
    with file.open("rb") as opened:
        assert not only_ours(opened.fileno(), 0o640)
