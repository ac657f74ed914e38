"""Disk and memory that an agent needs, estimated before it begins."""

from __future__ import annotations

from pathlib import Path
from stat import S_ISREG

import psutil

RESERVE_BYTES = 64 * 2**20
"""Disk that stays free, whatever is kept."""


def needed_bytes(size: int, peers: int, snapshots: int, checkpoints: int) -> int:
    """Return the bytes of disk that a round needs, the reserve that stays free included.

    `size`: bytes of a snapshot; `snapshots`, `checkpoints`: how many of its own the agent keeps.
    """
    # one more of each is being written; a checkpoint has two optimizer moments beside the weights
    return (snapshots + 1 + peers + 3 * (checkpoints + 1)) * size + RESERVE_BYTES


def memory_bytes(size: int, peers: int) -> int:
    """Return an estimate of the memory for weights in a round: weights, gradients, two moments, the peers' weights."""
    return (4 + peers + 1) * size


def available_memory() -> int:
    """Return the bytes of this machine's memory that new programs can have without swapping."""
    return psutil.virtual_memory().available


def little_memory(size: int, peers: int, available: int) -> str:
    """Return a warning where less memory is free than a round takes, else "". Both are estimates."""
    wanted = memory_bytes(size, peers)
    if available >= wanted:
        return ""
    return (
        f"{available / 1e6:,.0f} MB of memory are free, weights take about {wanted / 1e6:,.0f} MB in a round; "
        "stop other programs, or give the agent fewer peers or a smaller model"
    )


def held_bytes(folder: Path) -> int:
    """Return the bytes that an agent's folder takes on the disk; 0 where it is not there. A file that goes meanwhile is
    not counted, and one with several names once."""
    sizes: dict[tuple[int, int], int] = {}
    for file in folder.rglob("*"):
        try:
            found = file.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        if S_ISREG(found.st_mode):
            sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())
