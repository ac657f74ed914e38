"""What a merge puts away on disk: the same numbers, no name left, and one line where the disk is full.

Reference: the tensors themselves; /proc, and a file system of 1 MB of its own (a tmpfs, where one may be mounted).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from dimat.errors import DataError
from dimat.merge_files.write import SMALL, Scratch


def test_large_tensors_are_on_disk_without_a_name(tmp_path: Path) -> None:
    """Numbers and shape stay; nothing is to be seen in the folder, and the room is used."""
    tensor = torch.randn(700, 800, generator=torch.Generator().manual_seed(0))
    found = Scratch(tmp_path)(tensor)
    assert torch.equal(found, tensor)
    assert found.data_ptr() != tensor.data_ptr()
    assert not [*tmp_path.iterdir()]
    mapped = Path("/proc/self/maps").read_text() if os.path.exists("/proc/self/maps") else None
    if mapped is not None:
        assert f"{tmp_path}/.dimat-" in mapped
        del found
        assert f"{tmp_path}/.dimat-" not in Path("/proc/self/maps").read_text()


def test_what_is_not_worth_it_stays(tmp_path: Path) -> None:
    small = torch.zeros(SMALL // 8, dtype=torch.float64)
    assert Scratch(tmp_path)(small) is small
    numbers = torch.zeros(SMALL, dtype=torch.complex64)
    assert Scratch(tmp_path)(numbers) is numbers


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    """Before anything is mapped: a write to a hole on a full disk is a signal that kills."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs to mount a file system: run as root")
    try:
        with pytest.raises(DataError, match=r"cannot store 4,000,000 bytes .* in .*: No space left on device"):
            Scratch(tmp_path)(torch.ones(1000, 1000))
        assert not [*tmp_path.iterdir()]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
