"""Disk and memory that an agent needs, estimated before it begins."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn

from dimat.agent.lineage.manifest_log import LEDGER_BYTES
from dimat.agent.setup.prepare import PreparedAgent
from dimat.errors import ConfigError, DataError
from dimat.net.limits import DISK_RESERVE_BYTES
from dimat.train.base import ModelTrainer


@dataclass(frozen=True, slots=True)
class Needs:
    """Estimates of an agent's needs.

    `snapshot_bytes`: largest size of a snapshot, in any encoding, with everything sent beside it; `disk_bytes`: size of
    its folder, with the reserve that stays free; `memory_bytes`: see `peak_bytes`.
    """

    snapshot_bytes: int
    disk_bytes: int
    memory_bytes: int


def needs_of(trainer: ModelTrainer, setup: PreparedAgent, peers: int) -> Needs:
    """Return the needs of an agent with this model, this optimizer and this number of peers."""
    model, agent = trainer.model, setup.config.agent
    size = setup.largest_snapshot(model, trainer.optimizers())
    state = int(state_share(trainer.optimizer) * _trained(model))
    keep = setup.schedule.snapshots_kept(agent.keep_snapshots)
    # where snapshots hold logits, a checkpoint holds the weights all the same
    more = max(0, sum(tensor.nbytes for tensor in model.state_dict().values()) - size)
    disk = needed_bytes(size, state + more, peers, keep, agent.keep_checkpoints)
    return Needs(size, disk, peak_bytes(model, state, peers))


def needed_bytes(size: int, state: int, peers: int, snapshots: int, checkpoints: int) -> int:
    """Return the bytes of disk that a round needs, with the reserve that stays free.

    `size`: bytes of a snapshot; `state`: of the optimizer's state; `snapshots`, `checkpoints`: how many of its own the
    agent keeps.
    """
    # one more of each is being written, and another checkpoint holds the middle of a round, should it be stopped there
    return (snapshots + 1 + peers) * size + (checkpoints + 1 + 1) * (size + state) + DISK_RESERVE_BYTES


def peak_bytes(model: nn.Module, state: int, peers: int) -> int:
    """Return the peak memory of an agent's model, without activations, data and the extra needs of a merge that aligns
    or runs the model.

    Weights and the optimizer's state are always there. Beside them are gradients in training; in a merge, the merged
    weights with a tensor of each peer's and one to compute in; and when a checkpoint is taken up, the state as it was
    read. `state`: bytes of the optimizer's; `peers`: how many are merged.
    """
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    held, largest = sum(sizes.values()), max(sizes.values(), default=0)
    return held + state + max(_trained(model), held + (peers + 1) * largest, held + state)


def _trained(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def state_share(optimizer: torch.optim.Optimizer) -> float:
    """Return how many bytes an optimizer keeps for each byte of parameters: counted after a step on a matrix, if it can
    make one; else as many as Adam keeps."""
    probe = nn.Parameter(torch.zeros(64, 64))
    probe.grad = torch.zeros_like(probe)
    try:
        twin = type(optimizer)([probe], **optimizer.defaults)
        twin.step()
    except (TypeError, ValueError, RuntimeError, AttributeError):  # one that wants a closure, or more than groups
        return 2.0
    entries = cast("dict[str, Any]", twin.state.get(probe, {})).values()
    # counters of steps do not grow with the model
    held = sum(entry.nbytes for entry in entries if isinstance(entry, Tensor) and entry.ndim)
    return held / probe.nbytes


def available_memory() -> int:
    """Return the bytes of this machine's memory that new programs can have without swapping."""
    return psutil.virtual_memory().available


def little_memory(wanted: int, available: int) -> str:
    """Return a warning if less memory is free than a round takes, else "". Both are estimates."""
    if available >= wanted:
        return ""
    return (
        f"{available / 1e6:,.0f} MB of memory are free, the model takes about {wanted / 1e6:,.0f} MB in a round; "
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


def check_room(folder: Path, needs: Needs) -> str:
    """Return a warning if memory is short, else ""; raises DataError if the disk has no room for a round."""
    held = held_bytes(folder)
    free = shutil.disk_usage(folder).free
    if free + held < needs.disk_bytes:
        raise DataError(
            f"{folder} has {free / 1e6:,.0f} MB free, the agent needs about {(needs.disk_bytes - held) / 1e6:,.0f} MB; "
            "make room, or set agent.folder to another disk"
        )
    return little_memory(needs.memory_bytes, available_memory())


def held_bytes(folder: Path) -> int:
    """Return the bytes that an agent's folder takes on disk; 0 if it does not exist. A file that vanishes meanwhile is
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
