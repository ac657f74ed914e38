"""What an agent needs on its disk; the reference is a count of the files by hand."""

from __future__ import annotations

from pathlib import Path

from dimat.agent.daemon.resources import RESERVE_BYTES, available_memory, held_bytes, little_memory, needed_bytes


def test_all_that_lies_on_the_disk_at_once_is_counted() -> None:
    own, peers, written = 2, 3, 1
    checkpoints = (3 + written) * 3  # weights and two moments
    assert needed_bytes(1000, peers, own, 3) == (own + written + peers + checkpoints) * 1000 + RESERVE_BYTES


def test_a_folder_holds_its_files_and_one_that_is_not_there_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "agent"
    assert held_bytes(folder) == 0
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "agent.json").write_bytes(b"x" * 7)
    (folder / "checkpoints" / "one").write_bytes(b"x" * 100)
    assert held_bytes(folder) == 107


def test_little_memory_is_a_warning(tmp_path: Path) -> None:
    """Reference: seven models' weights with two peers, against what a file as /proc/meminfo has it says is free."""
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:  900000 kB\nMemAvailable:  1000 kB\n")
    free = available_memory(file)
    assert free == 1000 * 1024
    assert little_memory(free // 7, 2, free) == ""
    assert little_memory(free // 7 + 1, 2, free).startswith("1 MB of memory are free, weights take about 1 MB")
    assert available_memory(tmp_path / "none") is None
    assert little_memory(10**12, 2, None) == ""
