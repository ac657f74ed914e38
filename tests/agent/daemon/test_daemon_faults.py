"""Real agents that die by kill -9 at exact moments, are paused, or have no room left. References: what the round
promises (docs/what-happens-when.md), and the ledgers of all agents against what each has published."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from blake3 import blake3

from tests.agent.processes import Life, Network, check_ledgers, network

pytestmark = pytest.mark.live

ABC = ("lab-a", "lab-b", "lab-c")
DEADLINE_S = 10
SCHEDULE = f"rounds = 0\nround_deadline_s = {DEADLINE_S}\njoin_wait_s = 3"
TRAIN = "epochs_per_round = 20\nbatch_size = 8"
EXCHANGE = "lost_after_s = 1\nidle_s = 4"
WIDE = "epochs_per_round = 4\nbatch_size = 16"
"""For snapshots of 1.5 MB, which take several messages: what is to happen between two of them can."""
STAGES = ("joined", "trained", "merged")


def doomed(net: Network, name: str, moment: str, count: int, *, anew: bool = False) -> Life:
    """Start an agent that will die; `anew`: see `Network.start`."""
    return net.start(name, driver=("tests.agent.doomed", moment, str(count)), anew=anew)


def widen(net: Network) -> None:
    """Make the network of the task wide: see WIDE."""
    task = net.folder / "tiny_task.py"
    task.write_text(task.read_text().replace("(6, 12, 8, 4)", "(6, 600, 600, 4)"))


def stopped(life: Life) -> bool:
    """Whether a process is stopped by SIGSTOP."""
    return Path(f"/proc/{life.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def comes_in(net: Network, reader: str, peer: str) -> bool:
    """Whether a snapshot of a peer is on its way to a reader."""
    return any((net.folder / reader / "received").glob(f"*.{blake3(peer.encode()).hexdigest()[:16]}.part"))


def check_resumed(net: Network, name: str) -> None:
    """Check that an agent went on from its newest checkpoint in each of its lives, and offered what this one holds."""
    newest, resumed = (0, -1), None
    for event in net.events(name):
        if event.get("stage") == "training":  # beside a checkpoint, in the middle of the round after it
            continue
        if event["event"] == "Checkpointed":
            newest = (event["round"], STAGES.index(event["stage"]))
        elif event["event"] == "Resumed":
            resumed = (event["round"], STAGES.index(event["stage"]))
            assert resumed >= newest  # it may have died between the checkpoint and the word of it
        elif event["event"] == "Published" and resumed is not None:
            if STAGES[resumed[1]] == "trained":
                assert event["round"] == resumed[0]
            else:
                assert event["round"] >= resumed[0]
            resumed = None


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
        check_resumed(net, name)
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
    serving, anew = "serving" in dict(moments), "training" in dict(moments)
    train = WIDE if serving else TRAIN
    with network(tmp_path, ABC, free_ports, schedule=SCHEDULE, train=train, exchange=EXCHANGE) as net:
        if serving:
            widen(net)
        net.start("lab-a")
        net.start("lab-c")
        for number, (moment, count) in enumerate(moments):
            life = doomed(net, "lab-b", moment, count, anew=anew)
            assert life.wait() == -signal.SIGKILL, f"{moment}: {life.text()}"
            held = len(net.events("lab-a", "Merged"))
            net.until(lambda held=held: len(net.events("lab-a", "Merged")) > held, f"lab-a goes on after {moment}")
            if number and moment != "fetched":
                assert net.events("lab-b", "Resumed")
        net.start("lab-b", anew=anew)
        rejoin(net)
        for name in ("lab-a", "lab-c"):
            times = [event["time_s"] for event in net.events(name, "Merged")]
            assert max(b - a for a, b in pairwise(times)) < 3 * DEADLINE_S
        temporary = [path.name for path in (tmp_path / "lab-b").rglob(".*.tmp")]
        assert not temporary, "half-written files are removed"


def test_paused_and_clocks(tmp_path: Path, free_ports: list[int]) -> None:
    """An agent that is stopped (SIGSTOP) in the middle of a transfer to a peer is given up until it goes on; one whose
    clock is two minutes off takes part, and its peers say so."""
    with network(tmp_path, ABC, free_ports, schedule=SCHEDULE, train=WIDE, exchange=EXCHANGE) as net:
        widen(net)
        net.start("lab-a")
        b = doomed(net, "lab-b", "pausing", 5)
        doomed(net, "lab-c", "skew", 120)
        net.until(lambda: stopped(b), "lab-b is stopped in its fifth transfer")
        held = {name: len(net.events(name, "Merged")) for name in ABC}
        for name in ("lab-a", "lab-c"):
            net.until(lambda name=name: len(net.events(name, "Merged")) > held[name] + 2, f"{name} goes on")
            net.until(lambda name=name: net.partners(name) == {"lab-a", "lab-c"}, f"{name} merges without lab-b")
            assert net.events(name, "PeerLate", peer="lab-b")
        assert stopped(b)
        b.signal(signal.SIGCONT)
        rejoin(net)
        assert [w for w in net.events("lab-a", "Warned") if "clock" in w["message"] and "lab-c" in w["message"]]


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="needs root to mount a small disk")
def test_full_disk(tmp_path: Path, free_ports: list[int]) -> None:
    """An agent whose disk is full waits and says so; its peers go on; once there is room it goes on, with nothing
    lost. SIGTERM while it waits ends it as ever, with 143."""
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
            _fill(filler)
            life = net.lives[1]
            net.until(lambda: "trying again" in life.text(), "lab-b says that it waits")
            held = len(net.events("lab-a", "Merged"))
            net.until(lambda: len(net.events("lab-a", "Merged")) > held, "lab-a goes on")
            assert life.process.poll() is None
            filler.unlink()
            merged = len(net.events("lab-b", "Merged"))
            net.until(lambda: len(net.events("lab-b", "Merged")) > merged, "lab-b goes on")
            said = life.text().count("trying again")
            _fill(filler)
            net.until(lambda: life.text().count("trying again") > said, "lab-b waits once more")
            life.signal(signal.SIGTERM)
            assert life.wait() == 143
            told = r"No space left on device; (the previous checkpoint is kept|the training of round \d+ so far)"
            assert re.search(told, life.text())
            filler.unlink()
            net.start("lab-b")
            rejoin(net)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_fault_beside_training_ends_no_agent(tmp_path: Path, free_ports: list[int]) -> None:
    """An error that nobody foresaw, in what only watches the network. Reference: both agents run to the end."""
    with network(tmp_path, ABC[:2], free_ports, schedule="rounds = 2\nround_deadline_s = 20") as net:
        life = doomed(net, "lab-a", "unwatched", 0)
        net.start("lab-b")
        assert [each.wait() for each in net.lives] == [0, 0], life.text()
        assert "the network monitor ended: KeyError: 'rtt_s'; training continues without it" in life.text()


def _fill(filler: Path) -> None:
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(65536))
        except OSError:
            pass  # full
