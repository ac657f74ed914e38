"""The page on operating an agent: what can be run without root is run as it stands there, with two real agents, and
what the page says of files and exit codes is so."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tarfile
from pathlib import Path

import httpx
import pytest

from dimat import errors
from tests.agent.processes import PATIENCE_S, ROOT, network
from tests.forks import program

pytestmark = pytest.mark.page

PAGE = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
BLOCKS: list[str] = re.findall(r"^```\n# here\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def run(folder: Path, commands: str, code: int = 0) -> str:
    """Run commands as pasted, in the agents' folder; return what they print."""
    path = f"{folder / 'bin'}:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", "-euc", commands],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == code, f"{commands}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def test_the_page_as_pasted(tmp_path: Path, free_ports: list[int]) -> None:
    """All blocks in order: doctor, start, status, new keys, map change, logs, report, backup; then stop and resume."""
    program(tmp_path / "bin" / "dimat", "-m", "dimat.cli", env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    check, start, status, watch, renew, reload, logs, report, backup = BLOCKS
    slow = {"train": "epochs_per_round = 20\nbatch_size = 8", "schedule": "rounds = 0\nround_deadline_s = 30"}
    with network(tmp_path, ("lab-a", "lab-b"), free_ports, **slow) as net:
        # the page's agents lie beside their file, each in a folder of its name
        agents = (tmp_path / "agents.toml").read_text()
        first, last = agents.split("[agent]\n")
        (tmp_path / "agents.toml").write_text(f'{first}[agent]\nfolder = "lab-a"\n{last}')
        assert "fail peer lab-b" in run(tmp_path, check, code=3)  # it does not run yet
        start = start.replace("--name lab-b", "--name lab-b --set agent.folder=lab-b")
        try:
            run(tmp_path, start)
            for name in net.names:
                net.wait_for(name, "Checkpointed", stage="merged")
            shown = run(tmp_path, status)
            assert "lab-a of run tiny" in shown
            assert "lab-b of run tiny" in shown
            # the page's port may be taken here
            run(tmp_path, watch.replace("dashboard lab-a", "dashboard lab-a --listen 127.0.0.1:0"))
            said = tmp_path / "dashboard.err"
            address = net.until(lambda: re.search(r"http://\S+/", said.read_text()), "the dashboard")[0]
            assert "lab-a" in [agent["name"] for agent in httpx.get(f"{address}api/state").json()["agents"]]
            run(tmp_path, renew)
            net.wait_for("lab-a", "KeysRead", 2)
            run(tmp_path, reload)
            net.until(lambda: any("map was read" in e["message"] for e in net.events("lab-a", "Warned")), "a new map")
            assert '"accuracy"' in run(tmp_path, logs)
            assert "0 faults" in run(tmp_path, report)
            run(tmp_path, backup)
            with tarfile.open(tmp_path / "lab-a.tar.gz") as archive:
                assert any(re.fullmatch(r"lab-a/checkpoints/.*\.\w+", name) for name in archive.getnames())
            assert not missing(tmp_path / "lab-a")
            assert "fail" not in run(tmp_path, check)
        finally:
            pids = [int(file.read_text()) for file in tmp_path.glob("*.pid")]
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
        net.until(lambda: not any(map(_lives, pids)), "the end of both")
        (left,) = net.events("lab-a", "AgentLeft")
        before = net.events("lab-a", "Checkpointed")[-1]
        resumed = net.start("lab-a", f"schedule.rounds={before['round'] + 1}", "agent.linger_s=0")
        started = net.wait_for("lab-a", "AgentStarted", 2)[-1]
        assert started["round"] >= before["round"] - 1
        assert left["reason"] == "stopped"
        resumed.signal(signal.SIGTERM)
        assert resumed.wait() in (0, 143)


def missing(folder: Path) -> set[str]:
    """Return the names in the page's table of the folder that are not there; the DHT's is only where there is one."""
    table = PAGE.split("## The folder")[1].split("##")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    names = {name.strip("/") for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    assert len(names) == 12
    later = {"dht", "lineage.summary.json", "events.000001.jsonl"}
    return {name for name in names if not (folder / name).exists()} - later


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("kind", ["ConfigError", "NetworkError", "SecurityError", "DataError", "TrainingError"])
def test_exit_codes_are_those_of_the_page(kind: str) -> None:
    codes = re.findall(r"^\| (\d+)", PAGE.split("## Exit codes")[1], flags=re.MULTILINE)
    assert str(getattr(errors, kind).exit_code) in codes


def test_events_of_the_page_exist() -> None:
    from dimat import events

    table = PAGE.split("| event | content |")[1].split("\n\n")[0]
    names = re.findall(r"`(\w+)`", table)
    assert len(names) >= 10
    assert all(hasattr(events, name) for name in names)
