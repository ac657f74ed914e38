"""Disk and memory that an agent needs, estimated before it begins."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

import psutil

from dimat.agent.lineage.manifest_log import LEDGER_BYTES
from dimat.errors import ConfigError, DataError

RESERVE_BYTES = 64 * 2**20
"""Disk that stays free, whatever is kept."""


def needed_bytes(size: int, peers: int, snapshots: int, checkpoints: int) -> int:
    """Return the bytes of disk that a round needs, the reserve that stays free included.

    `size`: bytes of a snapshot; `snapshots`, `checkpoints`: how many of its own the agent keeps.
    """
    # one more of each is being written; a checkpoint has two optimizer moments beside the weights
    # and another one holds the middle of a round, should the agent be stopped there
    return (snapshots + 1 + peers + 3 * (checkpoints + 1 + 1)) * size + RESERVE_BYTES


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


@dataclass(frozen=True, slots=True)
class DiskShares:
    """The bytes that each thing that grows may take: peers' snapshots, one file of the log, and the two ledgers."""

    received: int
    log_file: int
    lineage: int
    manifests: int


def disk_shares(quota_mb: float | None, size: int, peers: int, logs_kept: int) -> DiskShares:
    """Return how `agent.disk_quota_mb` is shared out. `size`: bytes of a snapshot at most; `peers`: listened to.

    ConfigError where the part for peers' snapshots holds less than a round needs.
    """
    needed = (max(1, peers) + 1) * size
    if quota_mb is None:
        received, other = 4 * needed, max(LEDGER_BYTES, needed // 2)
    else:
        received, other = int(quota_mb * 1e6 * 5 / 8), int(quota_mb * 1e6 / 8)
    if received < needed:
        raise ConfigError(
            f"agent.disk_quota_mb = {quota_mb:g} leaves {received / 1e6:,.1f} MB for peers' snapshots, a round needs "
            f"{needed / 1e6:,.1f} MB; set it to {math.ceil(needed / 1e6 * 8 / 5):,} or more, or leave it out"
        )
    return DiskShares(received, other // (logs_kept + 1), other, other)


def check_room(folder: Path, size: int, peers: int, snapshots: int, checkpoints: int) -> str:
    """Return a warning where memory is short, else ""; DataError where the disk cannot hold what a round needs. See
    `needed_bytes` for the numbers."""
    needed = needed_bytes(size, peers, snapshots, checkpoints)
    held = held_bytes(folder)
    free = shutil.disk_usage(folder).free
    if free + held < needed:
        raise DataError(
            f"{folder} has {free / 1e6:,.0f} MB free, the agent needs about {(needed - held) / 1e6:,.0f} MB; make "
            "room, or set agent.folder to another disk"
        )
    return little_memory(size, peers, available_memory())


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
