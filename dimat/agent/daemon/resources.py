"""The disk space and memory that an agent needs, checked before it begins."""

from __future__ import annotations

from pathlib import Path

RESERVE_BYTES = 64 * 2**20
"""Left free on the disk, whatever is kept."""


def needed_bytes(size: int, peers: int, snapshots: int, checkpoints: int) -> int:
    """Return what a round needs on disk, what is left free among it.

    `size`: bytes of a snapshot; `snapshots`, `checkpoints`: how many own ones are kept.
    """
    # one more of each is being written; a checkpoint has two optimizer moments beside the weights
    return (snapshots + 1 + peers + 3 * (checkpoints + 1)) * size + RESERVE_BYTES


def memory_bytes(size: int, peers: int) -> int:
    """Return about how much memory a round takes.

    Weights, gradients, two moments, and the tensors that a merge reads.
    """
    return (4 + peers + 1) * size


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Return the bytes of memory that are free for new programs; None where this is not told."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def little_memory(size: int, peers: int, available: int | None) -> str:
    """Return a warning where less is free than a round takes, else "".

    No more than that: both are estimates.
    """
    wanted = memory_bytes(size, peers)
    if available is None or available >= wanted:
        return ""
    return (
        f"{available / 1e6:,.0f} MB of memory are free, weights take about {wanted / 1e6:,.0f} MB in a round; "
        "stop other programs, or give the agent fewer peers or a smaller model"
    )


def held_bytes(folder: Path) -> int:
    """Return what an agent's folder takes by now; 0 where it is not there."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
