"""An agent's own dashboard, in real processes. References: its log, and `dimat status`."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import httpx
import pytest

from dimat.cli import main
from dimat.config import load_experiment
from tests.agent.processes import Life, network

pytestmark = pytest.mark.live
AB = ("lab-a", "lab-b")
SCHEDULE = "rounds = 0\nround_deadline_s = 5\njoin_wait_s = 3"
EXCHANGE = "lost_after_s = 1\nidle_s = 4"


def said_address(life: Life) -> str:
    words = next((line for line in life.text().splitlines() if line.startswith("dashboard of lab-a: ")), "")
    return words.removeprefix("dashboard of lab-a: ").removesuffix("/")


def test_what_one_agent_knows(tmp_path: Path, free_ports: list[int]) -> None:
    """Itself by its events, its peer by the link and by what that one says; a peer that is killed is lost; and the
    agent ends with its page open as without."""
    monitor = "dashboard = '127.0.0.1:0'"
    with network(tmp_path, AB, free_ports, schedule=SCHEDULE, exchange=EXCHANGE, monitor=monitor) as net:
        life = net.start("lab-a")
        other = net.start("lab-b", "monitor.dashboard=127.0.0.1:0")
        net.wait_for("lab-a", "Merged", 2)
        address = net.until(lambda: said_address(life), "the dashboard's address")

        def agents() -> dict[str, dict[str, object]]:
            state = httpx.get(f"{address}/api/state").json()
            assert state["run"]["view"] == "lab-a"
            return {agent["name"]: agent for agent in state["agents"]}

        def both() -> bool:
            found = agents()
            return found.keys() == set(AB) and all(
                agent["state"] in ("running", "late") and agent["metric"] is not None for agent in found.values()
            )

        net.until(both, "both agents run, and their metrics are known")
        assert agents()["lab-a"]["own"] is True
        assert agents()["lab-b"]["own"] is False
        started = net.events("lab-a", "AgentStarted")[0]
        assert sum(started["histogram"]) == started["samples"]
        assert agents()["lab-a"]["histogram"] == started["histogram"]
        assert httpx.get(f"{address}/api/lineage").json()["contributors"]
        assert "own machine" in httpx.get(f"{address}/api/lineage", params={"agent": "lab-b"}).json()["error"]
        other.signal(signal.SIGKILL)
        net.until(lambda: agents()["lab-b"]["state"] == "lost", "the killed peer is lost")
        with httpx.stream("GET", f"{address}/api/events", timeout=60) as answer:
            assert answer.status_code == 200
            life.signal(signal.SIGTERM)
            assert life.wait() == 143, life.text()


def test_port_in_use_and_open_to_all(tmp_path: Path, free_ports: list[int]) -> None:
    """The agent does not start: 3 for the port, 4 for a dashboard that everybody could read."""
    with network(tmp_path, AB, free_ports) as net, socket.create_server(("127.0.0.1", 0)) as taken:
        lives = [
            net.start("lab-a", f"monitor.dashboard=127.0.0.1:{taken.getsockname()[1]}"),
            net.start("lab-b", "monitor.dashboard=0.0.0.0:0"),
        ]
        assert [life.wait() for life in lives] == [3, 4]
        assert "choose another port" in lives[0].text()
        assert "token" in lives[1].text()


def test_wrong_address_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "agents.toml"
    file.write_text("[monitor]\ndashboard = 'here'\n")
    assert main(["agent", str(file), "--name", "lab-a"]) == 2
    assert "monitor.dashboard" in capsys.readouterr().err


def test_off_by_default() -> None:
    """Only what is asked for is served."""
    assert load_experiment().monitor.dashboard is None
    assert load_experiment(overrides=["monitor.dashboard=[::1]:8300"]).monitor.dashboard == "[::1]:8300"
