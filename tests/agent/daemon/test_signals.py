"""Signals that come at any time in an agent's life, and an agent that a new map does not have any more. References: the
exit codes (docs/operating.md), and the map that is read."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from dimat.agent.daemon.removal import Removal
from dimat.cli.agent import _Signals  # pyright: ignore[reportPrivateUsage]
from tests.agent.processes import network
from tests.simulate.helpers import TINY_TASK

ABC = ("lab-a", "lab-b", "lab-c")
SCHEDULE = "rounds = 0\nround_deadline_s = 20\njoin_wait_s = 3"
SLOW = "epochs_per_round = 20\nbatch_size = 8"
LOADING = """
import time
from pathlib import Path

Path(__file__).with_name("loading").touch()
while not Path(__file__).with_name("go").exists():
    time.sleep(0.02)
"""
GRPC_LINE = re.compile(r"^(?:[IWEF]\d{4} |WARNING: All log messages)", re.MULTILINE)
"""A line of gRPC's own log, or what its logging says of itself before the first one."""


def test_a_signal_before_the_loop_runs_is_remembered() -> None:
    """Reference: what a default SIGHUP does to a process. Two of them are one reload; later ones reach the loop."""
    done: list[str] = []

    async def run(signals: _Signals) -> None:
        stopped = asyncio.Event()
        signals.serve({signal.SIGHUP: lambda: done.append("reload"), signal.SIGUSR1: stopped.set})
        assert done == ["reload"]
        os.kill(os.getpid(), signal.SIGUSR1)
        await asyncio.wait_for(stopped.wait(), 5)

    before = signal.getsignal(signal.SIGHUP)
    with _Signals() as signals:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        asyncio.run(run(signals))
        os.kill(os.getpid(), signal.SIGHUP)  # after the end: nothing is left to reload
    assert done == ["reload"]
    assert signal.getsignal(signal.SIGHUP) is before


@pytest.mark.live
def test_the_map_is_read_anew_after_the_start_that_a_sighup_came_in(tmp_path: Path, free_ports: list[int]) -> None:
    """The task takes long to load: a SIGHUP meanwhile ends nothing, and counts once the agent is up."""
    with network(tmp_path, ABC[:2], free_ports, schedule=SCHEDULE, train=SLOW) as net:
        (tmp_path / "tiny_task.py").write_text(LOADING + TINY_TASK)
        life = net.start("lab-a")
        net.until((tmp_path / "loading").exists, "it loads the task")
        life.signal(signal.SIGHUP)
        (tmp_path / "go").touch()
        net.wait_for("lab-a", "MapRead")
        kinds = [event["event"] for event in net.events("lab-a")]
        assert kinds.index("MapRead") > kinds.index("AgentStarted")
        life.signal(signal.SIGUSR1)
        assert life.wait() == 128 + signal.SIGUSR1, life.text()
        assert net.events("lab-a", "AgentLeft")


@pytest.mark.live
@pytest.mark.parametrize("module", ["cyclopts", "dimat.cli.topology", "dimat.config", "torch"])
def test_a_sighup_while_an_agent_is_loaded_is_kept(tmp_path: Path, free_ports: list[int], module: str) -> None:
    """A new process, as people start it, is hung up in the moment that it begins to load one of what it needs: nothing
    ends, and the map is read again once, when the agent is up."""
    with network(tmp_path, ABC[:2], free_ports, schedule=SCHEDULE, train=SLOW) as net:
        life = net.start("lab-a", driver=("tests.cli.hung_up", module), anew=True)
        net.until(lambda: net.events("lab-a", "MapRead") or life.process.poll() is not None, "it reads the map")
        assert life.process.poll() is None, life.text()
        net.wait_for("lab-a", "PhaseStarted", phase="train")
        kinds = [event["event"] for event in net.events("lab-a")]
        assert kinds.index("MapRead") > kinds.index("AgentStarted")
        assert kinds.count("MapRead") == 1
        life.signal(signal.SIGUSR1)
        assert life.wait() == 128 + signal.SIGUSR1, life.text()


def catches(pid: int, number: signal.Signals) -> bool:
    """Tell whether a process has a handler for a signal."""
    lines = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    return bool(int(lines["SigCgt"], 16) >> (number - 1) & 1)


@pytest.mark.live
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("wait_s", [0.0, 0.05, 0.2, 0.6])
def test_a_sighup_soon_after_the_start_is_kept(tmp_path: Path, free_ports: list[int], wait_s: float) -> None:
    """From outside, so long after the process has begun to run our code."""
    with network(tmp_path, ABC[:2], free_ports, schedule=SCHEDULE, train=SLOW) as net:
        life = net.start("lab-a", anew=True)
        net.until(lambda: catches(life.process.pid, signal.SIGHUP), "it catches SIGHUP")
        time.sleep(wait_s)
        life.signal(signal.SIGHUP)
        net.until(lambda: net.events("lab-a", "MapRead") or life.process.poll() is not None, "it reads the map")
        assert life.process.poll() is None, life.text()
        life.signal(signal.SIGUSR1)
        assert life.wait() == 128 + signal.SIGUSR1, life.text()


SWALLOWS = """
import os, signal
from pathlib import Path


class Lost:
    def __del__(self):  # Python prints what is raised here, and goes on
        os.kill(os.getpid(), signal.SIGTERM)


if not Path(__file__).with_name("asked").exists():
    Path(__file__).with_name("asked").touch()
    try:
        Lost()
    except BaseException:
        pass
"""


@pytest.mark.live
def test_a_sigterm_that_the_start_swallows_is_not_lost(tmp_path: Path, free_ports: list[int]) -> None:
    """What a handler raises in a destructor, or below an `except`, is lost; the signal is not: the agent leaves."""
    with network(tmp_path, ABC[:2], free_ports, schedule=SCHEDULE, train=SLOW) as net:
        (tmp_path / "tiny_task.py").write_text(SWALLOWS + TINY_TASK)
        life = net.start("lab-a")
        assert life.wait(30) == 143, life.text()
        assert (tmp_path / "asked").exists()
        assert "dimat: leaving; once more to stop at once" in life.text()


@pytest.mark.live
def test_a_signal_that_comes_twice_at_once_is_one(tmp_path: Path, free_ports: list[int]) -> None:
    """As `timeout` sends it, to the process and then to its group: the agent leaves in good order, and its round's
    training is saved."""
    with network(tmp_path, ABC[:2], free_ports, schedule=SCHEDULE, train="epochs_per_round = 2000") as net:
        life = net.start("lab-a")
        net.wait_for("lab-a", "PhaseStarted", phase="train")
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            life.signal(number)
        assert life.wait() == 143, life.text()
        assert "stopped at once" not in life.text()
        assert net.events("lab-a", "AgentLeft")
        assert net.events("lab-a", "Checkpointed", stage="training")


@pytest.mark.live
def test_an_agent_that_was_removed_from_the_map_says_so_and_leaves(tmp_path: Path, free_ports: list[int]) -> None:
    """lab-c reads a map without itself: it says what will become of it, leaves after exchange.lost_after_s with the
    exit code of a wrong map, and one line says which key would let it go on. With that key it trains on alone."""
    exchange = "lost_after_s = 1"
    with network(tmp_path, ABC, free_ports, schedule=SCHEDULE, train=SLOW, exchange=exchange) as net:
        leaving = net.start("lab-c")
        net.wait_for("lab-c", "AgentStarted")
        net.write_map(ABC[:2])
        leaving.signal(signal.SIGHUP)
        assert leaving.wait() == 2, leaving.text()
        (left,) = net.events("lab-c", "AgentLeft")
        assert left["reason"] == "removed from the network map"
        (said,) = [event["message"] for event in net.events("lab-c", "Warned") if "no longer" in event["message"]]
        assert said.startswith("lab-c is no longer on the network map: it exchanges weights with nobody, and stops")
        assert "agent.go_on_alone = true" in leaving.text().strip().splitlines()[-1]

        net.write_map()
        staying = net.start("lab-b", "agent.go_on_alone=true")
        net.wait_for("lab-b", "AgentStarted")
        net.write_map(("lab-a", "lab-c"))
        staying.signal(signal.SIGHUP)
        net.wait_for("lab-b", "MapRead")
        alone = len(net.events("lab-b", "Merged"))
        net.until(lambda: len(net.events("lab-b", "Merged")) > alone + 5, "it trains on")
        assert net.events("lab-b", "Merged")[-1]["expected"] == 0
        staying.signal(signal.SIGTERM)
        assert staying.wait() == 143


def test_an_agent_that_comes_back_on_the_map_stays() -> None:
    """Between two maps, and no sooner than after the wait."""
    said: list[str] = []
    stopped: list[str] = []

    async def run() -> Removal:
        removal = Removal("lab-a", 0.05, False, said.append, stopped.append)
        removal.look(ABC)
        assert not said
        removal.look(ABC[1:])
        removal.look(ABC[1:])
        removal.look(ABC)
        await asyncio.sleep(0.1)
        assert not stopped
        removal.look(ABC[1:])
        await asyncio.sleep(0.1)
        return removal

    assert asyncio.run(run()).over
    assert [message.split(" is ")[1][:9] for message in said] == ["no longer", "on the ne", "no longer"]
    assert stopped == ["removed from the network map"]


@pytest.mark.live
@pytest.mark.slow
def test_grpc_says_nothing_before_us(tmp_path: Path, free_ports: list[int]) -> None:
    """A port that is taken, and a peer whose certificate is another CA's: gRPC has lines of its own for both, which
    reach nobody; ours do."""
    (tmp_path / "other").mkdir()
    with (
        network(tmp_path, ABC[:2], free_ports, schedule=SCHEDULE, train=SLOW, exchange="lost_after_s = 1") as net,
        network(tmp_path / "other", ABC[:2], free_ports, schedule=SCHEDULE, train=SLOW) as others,
        socket.socket() as taken,
    ):
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        life = net.start("lab-a", f"agent.listen=127.0.0.1:{taken.getsockname()[1]}", anew=True)
        assert life.wait() == 3
        assert len(life.text().strip().splitlines()) == 1, life.text()
        assert life.text().startswith("dimat: cannot listen on")
        lives = [net.start("lab-a", anew=True), others.start("lab-b", anew=True)]
        net.until(lambda: "no TLS connection" in lives[0].text(), "lab-a names the fault")
        for each in lives:
            each.signal(signal.SIGTERM)
            assert each.wait() == 143
            assert not GRPC_LINE.search(each.text()), each.text()
