"""Real agents that die by kill -9 at exact moments, are paused, or have no room left. References: what the round
promises (docs/what-happens-when.md), and the ledgers of all agents against what each has published."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from tests.agent.processes import Life, Network, check_ledgers, network

ABC = ("lab-a", "lab-b", "lab-c")
DEADLINE_S = 10
SCHEDULE = f"rounds = 0\nround_deadline_s = {DEADLINE_S}\njoin_wait_s = 3"
TRAIN = "epochs_per_round = 20\nbatch_size = 8"
EXCHANGE = "lost_after_s = 1\nidle_s = 4"


def doomed(net: Network, name: str, moment: str, count: int) -> Life:
    """Start an agent that will die."""
    return net.start(name, driver=("tests.agent.doomed", moment, str(count)))


def all_together(net: Network, since: dict[str, int]) -> bool:
    """Whether each agent has merged with all others again, after so many merges before."""
    for name in ABC:
        merges = net.events(name, "Merged")[since[name] :]
        if not any(len(merge["contributions"]) == 3 for merge in merges):
            return False
    return True


def rejoin(net: Network) -> None:
    """Wait until all merge all, then stop all; and check what they leave behind."""
    since = {name: len(net.events(name, "Merged")) for name in ABC}
    net.until(lambda: all_together(net, since), "all merge all again")
    running = [life for life in net.lives if life.process.poll() is None]
    for life in running:
        life.signal(signal.SIGTERM)
    assert [life.wait() for life in running] == [143] * len(running), "\n".join(life.text() for life in running)
    check_ledgers(net)
    # a merge is durable with its record: no round is left out of the ledger that a checkpoint knows
    for name in ABC:
        merged = {event["round"] for event in net.events(name, "Checkpointed") if event["stage"] == "merged"}
        assert merged <= {record["round"] for record in net.records(name) if record["kind"] == "merge"}


@pytest.mark.parametrize(
    "moments",
    [
        [("training", 2), ("recording", 1), ("publishing", 1)],
        [("published", 2), ("serving", 1), ("fetching", 1)],
        [("fetched", 3), ("merging", 1), ("ledger", 2)],
        [("checkpointing", 5), ("checkpointed", 2), ("checkpointing", 1)],
    ],
    ids=lambda moments: "-".join(moment for moment, _ in moments),
)
def test_kill_9(tmp_path: Path, free_ports: list[int], moments: list[tuple[str, int]]) -> None:
    """lab-b dies at one moment, is started again, dies at the next, …; the others go on meanwhile and end each round in
    time; at last all merge all again. Nothing is published anew with other content, nothing merged in part."""
    with network(tmp_path, ABC, free_ports, schedule=SCHEDULE, train=TRAIN, exchange=EXCHANGE) as net:
        net.start("lab-a")
        net.start("lab-c")
        for number, (moment, count) in enumerate(moments):
            life = doomed(net, "lab-b", moment, count)
            assert life.wait() == -signal.SIGKILL, f"{moment}: {life.text()}"
            held = len(net.events("lab-a", "Merged"))
            net.until(lambda held=held: len(net.events("lab-a", "Merged")) > held, f"lab-a goes on after {moment}")
            if number and moment != "fetched":
                assert net.events("lab-b", "Resumed")
        net.start("lab-b")
        rejoin(net)
        for name in ("lab-a", "lab-c"):
            times = [event["time_s"] for event in net.events(name, "Merged")]
            assert max(b - a for a, b in pairwise(times)) < 3 * DEADLINE_S
        temporary = [path.name for path in (tmp_path / "lab-b").rglob(".*.tmp")]
        assert not temporary, "half-written files are removed"


def test_paused_and_clocks(tmp_path: Path, free_ports: list[int]) -> None:
    """An agent that is stopped (SIGSTOP) is given up until it goes on; one whose clock is two minutes off takes part,
    and its peers say so."""
    with network(tmp_path, ABC, free_ports, schedule=SCHEDULE, train=TRAIN, exchange=EXCHANGE) as net:
        net.start("lab-a")
        b = net.start("lab-b")
        doomed(net, "lab-c", "skew", 120)
        net.wait_for("lab-a", "SnapshotFetched", peer="lab-c")
        net.wait_for("lab-a", "SnapshotFetched", peer="lab-b")
        b.signal(signal.SIGSTOP)
        held = len(net.events("lab-a", "Merged"))
        net.until(lambda: len(net.events("lab-a", "Merged")) > held + 2, "lab-a goes on without lab-b")
        b.signal(signal.SIGCONT)
        rejoin(net)
        assert [w for w in net.events("lab-a", "Warned") if "clock" in w["message"] and "lab-c" in w["message"]]


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="needs root to mount a small disk")
def test_full_disk(tmp_path: Path, free_ports: list[int]) -> None:
    """An agent whose disk is full waits and says so; its peers go on; once there is room it goes on, with nothing
    lost."""
    disk = tmp_path / "lab-b"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with network(tmp_path, ABC, free_ports, schedule=SCHEDULE, train=TRAIN, exchange=EXCHANGE) as net:
            for name in ABC:
                net.start(name)
            net.wait_for("lab-b", "SnapshotFetched", peer="lab-a")
            filler = disk / "filler"
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(65536))
                except OSError:
                    pass  # full
            life = net.lives[1]
            net.until(lambda: "trying again" in life.text(), "lab-b says that it waits")
            held = len(net.events("lab-a", "Merged"))
            net.until(lambda: len(net.events("lab-a", "Merged")) > held, "lab-a goes on")
            assert life.process.poll() is None
            filler.unlink()
            rejoin(net)
    finally:
        subprocess.run(["umount", disk], check=True)
