"""The room that an agent takes on its disk: looked at before it begins, by itself and by `dimat doctor`."""

from __future__ import annotations

from pathlib import Path

RESERVE_BYTES = 64 * 2**20
"""Left free on the disk, whatever is kept."""


def needed_bytes(size: int, peers: int, snapshots: int, checkpoints: int) -> int:
    """Return what a round needs on disk, what is left free among it. `size`: bytes of a snapshot; `snapshots`,
    `checkpoints`: how many own ones are kept."""
    # one more of each is being written; a checkpoint has two optimizer moments beside the weights
    return (snapshots + 1 + peers + 3 * (checkpoints + 1)) * size + RESERVE_BYTES


def held_bytes(folder: Path) -> int:
    """Return what an agent's folder takes by now; 0 where it is not there."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
