"""What an agent needs on its disk; the reference is a count of the files by hand."""

from __future__ import annotations

from pathlib import Path

from dimat.agent.room import RESERVE_BYTES, held_bytes, needed_bytes


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
