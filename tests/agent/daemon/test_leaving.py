"""Agents that are told to leave twice: a first Ctrl-C lets them leave in good order, a second one ends them at once,
whatever they wait for. References: the exit codes (docs/operating.md), and what the next life finds."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from dimat.agent.daemon.status_socket import ask
from dimat.cli.agent import SAME_S
from tests.agent.daemon.test_daemon_faults import WIDE, check_resumed, comes_in, doomed, widen
from tests.agent.processes import Life, Network, check_ledgers, network

pytestmark = pytest.mark.live

AB = ("lab-a", "lab-b")
SCHEDULE = "rounds = 0\nround_deadline_s = 60\njoin_wait_s = 3"
SOON_S = 30.0  # for what takes no time, on a busy machine; what an agent waits for here takes minutes, or for ever
ONCE, TWICE = "leaving; once more to stop at once", "stopped at once"


def temporary(folder: Path) -> list[str]:
    """Return the half-written files in an agent's folder."""
    return [path.name for path in folder.rglob(".*.tmp")]


def interrupt(net: Network, life: Life) -> None:
    """Press Ctrl-C once, which begins the leaving, and a second time, which ends it."""
    life.signal(signal.SIGINT)
    net.until(lambda: ONCE in life.text(), f"{life.name} leaves")
    time.sleep(2 * SAME_S)
    assert TWICE not in life.text()


def go_on(net: Network) -> None:
    """Start lab-a again, let both merge both, and check what all lives have left."""
    lab_a = net.start("lab-a")
    resumed = net.wait_for("lab-a", "Resumed")[0]
    known = [(event["round"], event["stage"]) for event in net.events("lab-a", "Checkpointed")]
    assert (resumed["round"], resumed["stage"]) in known
    since = len(net.events("lab-b", "Merged"))
    net.until(lambda: len(net.events("lab-b", "Merged")) > since and net.partners("lab-b") == set(AB), "they merge")
    running = (lab_a, net.lives[1])
    for life in running:
        life.signal(signal.SIGTERM)
    assert [life.wait() for life in running] == [143] * 2, "\n".join(life.text() for life in running)
    check_ledgers(net)
    for name in AB:
        check_resumed(net, name)
        # a snapshot that was being recorded when the agent left may lie in snapshots/ under a temporary name, until the
        # next start sweeps it away; checkpoints are whole
        assert not temporary(net.folder / name / "checkpoints")


def test_while_a_transfer_is_let_end(tmp_path: Path, free_ports: list[int]) -> None:
    """lab-a is stopped while lab-b fetches from it over a slow line: it takes its time, until the second Ctrl-C. What
    lab-b has of the snapshot is not merged."""
    with network(tmp_path, AB, free_ports, schedule=SCHEDULE, train=WIDE, exchange="idle_s = 60") as net:
        widen(net)
        slow = net.start("lab-a", "exchange.rate_limit_mb_s=0.01", "agent.drain_s=600")  # 150 s a snapshot
        net.start("lab-b")
        net.until(lambda: comes_in(net, "lab-b", "lab-a"), "lab-b has begun to fetch")
        net.until(lambda: ask(tmp_path / "lab-a")["sent_bytes"], "the first bytes are on their way")
        interrupt(net, slow)
        net.wait_for("lab-a", "AgentLeft", timeout=30)
        # lab-b is served on, and lab-a waits for that
        time.sleep(5)
        assert slow.process.poll() is None
        assert comes_in(net, "lab-b", "lab-a")
        slow.signal(signal.SIGINT)
        assert slow.wait(SOON_S) == 130
        assert TWICE in slow.text()
        assert not net.events("lab-b", "SnapshotFetched")
        assert not temporary(tmp_path / "lab-a")
        go_on(net)


def test_while_a_checkpoint_is_written(tmp_path: Path, free_ports: list[int]) -> None:
    """lab-a is stopped while its disk hangs in the middle of a checkpoint: it waits for that, until the second Ctrl-C.
    The next life goes on from the checkpoint before, and removes the half."""
    with network(tmp_path, AB, free_ports, schedule=SCHEDULE, train=WIDE) as net:
        stuck = doomed(net, "lab-a", "hanging", 4)
        net.start("lab-b")
        held = net.wait_for("lab-a", "Checkpointed", 3)
        net.until(lambda: temporary(tmp_path / "lab-a" / "checkpoints"), "half a checkpoint is written")
        interrupt(net, stuck)
        assert stuck.process.poll() is None
        stuck.signal(signal.SIGINT)
        assert stuck.wait(SOON_S) == 130
        assert TWICE in stuck.text()
        assert net.events("lab-a", "Checkpointed") == held
        assert temporary(tmp_path / "lab-a" / "checkpoints")
        go_on(net)
