"""What an agent needs on its disk; the reference is a count of the files by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import fmean, linear_regression, pvariance
from typing import Any

import pytest

from dimat.agent.daemon.resources import (
    available_memory,
    disk_shares,
    held_bytes,
    little_memory,
    needed_bytes,
    needs_of,
)
from dimat.agent.lineage.manifest_log import LEDGER_BYTES
from dimat.agent.setup.prepare import prepare_agent
from dimat.errors import ConfigError
from dimat.net.limits import DISK_RESERVE_BYTES
from tests.forks import start
from tests.simulate.helpers import tiny_experiment

FIXED = 12e6
"""Bytes that a peak may lie above the estimate whatever the model: buffers, code that is loaded late."""


def test_all_that_lies_on_the_disk_at_once_is_counted() -> None:
    own, peers, written, middle = 2, 3, 1, 1
    snapshots, checkpoints = (own + written + peers) * 1000, (3 + written + middle) * (1000 + 2000)
    assert needed_bytes(1000, 2000, peers, own, 3) == snapshots + checkpoints + DISK_RESERVE_BYTES


def test_where_logits_travel_a_checkpoint_holds_the_weights_all_the_same(tmp_path: Path) -> None:
    """A snapshot has the size of the probe set; counted by hand, with Adam's two moments."""
    config = tiny_experiment(tmp_path, merge={"method": "distil"}, agent={"name": "agent-1"}, task={"name": "digits"})
    setup = prepare_agent(config)
    trainer = setup.learner(tmp_path).trainer
    needs = needs_of(trainer, setup, 2)
    weights = sum(tensor.nbytes for tensor in trainer.model.state_dict().values())
    state = 2 * sum(parameter.nbytes for parameter in trainer.model.parameters())
    assert needs.snapshot_bytes < weights
    kept, checkpoints = setup.schedule.snapshots_kept(config.agent.keep_snapshots), config.agent.keep_checkpoints
    expected = (kept + 1 + 2) * needs.snapshot_bytes + (checkpoints + 2) * (weights + state) + DISK_RESERVE_BYTES
    assert needs.disk_bytes == expected


def test_a_folder_holds_its_files_and_one_that_is_not_there_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "agent"
    assert held_bytes(folder) == 0
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "agent.json").write_bytes(b"x" * 7)
    (folder / "checkpoints" / "one").write_bytes(b"x" * 100)
    assert held_bytes(folder) == 107
    (folder / "weights").hardlink_to(folder / "checkpoints" / "one")
    assert held_bytes(folder) == 107


@pytest.mark.parametrize(("quota_mb", "kept"), [(8.0, 4), (80.0, 1)])
def test_all_that_grows_keeps_inside_the_quota(quota_mb: float, kept: int) -> None:
    """Snapshots, the log with the files put aside, and the two ledgers, together."""
    shares = disk_shares(quota_mb, 1000, 2, kept)
    whole = shares.received + (kept + 1) * shares.log_file + shares.lineage + shares.manifests
    assert 0.99 * quota_mb * 1e6 < whole <= quota_mb * 1e6
    assert shares.received == quota_mb * 1e6 * 5 / 8


def test_a_quota_that_a_round_does_not_fit_in_is_refused() -> None:
    """By hand: two peers and one more snapshot of 1 MB are 3 MB, five eighths of 4.8 MB; without a quota all fits."""
    assert disk_shares(4.81, 10**6, 2, 4).received >= 3 * 10**6
    with pytest.raises(
        ConfigError, match=r"agent.disk_quota_mb = 4 leaves 2.5 MB .*, a round needs 3.0 MB; set it to 5"
    ):
        disk_shares(4.0, 10**6, 2, 4)
    free = disk_shares(None, 10**6, 2, 4)
    assert (free.received, free.lineage, free.manifests) == (12 * 10**6, LEDGER_BYTES, LEDGER_BYTES)
    assert disk_shares(None, 10**9, 2, 4).lineage > LEDGER_BYTES


def test_little_memory_is_a_warning() -> None:
    free = 1_000_000
    assert little_memory(free, free) == ""
    assert little_memory(free + 1, free).startswith("1 MB of memory are free, the model takes about 1 MB")


@pytest.mark.live
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the reference is the kernel's VmHWM, of Linux")
@pytest.mark.parametrize(
    ("optimizer", "width"),  # widths of 20 and 80 MB
    [
        ("name=adam", 1000),
        ("name=sgd", 2000),
        pytest.param("name=adam", 2000, marks=pytest.mark.more),
        pytest.param("name=sgd", 1000, marks=pytest.mark.more),
    ],
)
def test_the_estimate_of_memory_is_true(tmp_path: Path, width: int, optimizer: str) -> None:
    """Reference: the peak of a process that trains, publishes, merges with two peers and writes checkpoints, and of one
    that takes the last one up. The estimate is at most an eighth off what both took at most, and some megabytes that
    do not grow with the model; with SGD it is under five models and as much."""
    peaks = [run(tmp_path, width, 2, optimizer) for _ in range(2)]
    estimate, model = peaks[0]["estimate"], peaks[0]["model"]
    most = max(each["peak"] for each in peaks)
    assert most / 1.125 - FIXED <= estimate <= most * 1.125, peaks
    assert "adam" in optimizer or most <= 5 * model + FIXED, peaks


@pytest.mark.live
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the reference is the kernel's RssAnon, of Linux")
def test_memory_does_not_grow_with_rounds(tmp_path: Path) -> None:
    """Reference: a line through the last 200 of 300 rounds of a small model, by least squares: the upper end of the
    95 % interval of its slope is under 1 kB a round. `benchmarks/agent_memory.py`: 2,000 rounds over the network."""
    held = run(tmp_path, 16, 300, "name=adam")["anonymous"][100:]
    blocks = [fmean(held[i : i + 10]) for i in range(0, len(held), 10)]  # neighbours are alike, and count once
    rounds = [10.0 * i for i in range(len(blocks))]
    slope, start_at = linear_regression(rounds, blocks)
    rest = sum((y - start_at - slope * x) ** 2 for x, y in zip(rounds, blocks))
    error = (rest / (len(blocks) - 2) / (len(blocks) * pvariance(rounds))) ** 0.5
    assert slope + 1.96 * error < 1000, (slope, error, held[::30])


def run(folder: Path, width: int, rounds: int, *optimizer: str) -> dict[str, Any]:
    """Do rounds with two peers in a process of their own, or take up what they left; return what it says."""
    said = folder / "said"
    words = ["-m", "tests.agent.daemon.peak", str(folder), str(width), "2", str(rounds), *optimizer]
    with said.open("wb") as stream:
        process = start(words, env=os.environ, stdout=stream.fileno(), stderr=stream.fileno())
    assert process.wait(250) == 0, said.read_text()
    return json.loads(said.read_text().splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the reference is /proc/meminfo, which Linux has")
def test_available_memory_is_what_the_kernel_estimates() -> None:
    """Reference: MemAvailable of /proc/meminfo, read by hand before and after."""

    def estimate() -> int:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))

    around = [estimate(), estimate()]
    free = available_memory()
    around.append(estimate())
    assert min(around) - 2**29 <= free <= max(around) + 2**29
