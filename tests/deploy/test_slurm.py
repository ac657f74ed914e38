"""The Slurm script, run for real, with real agents on loopback. Slurm alone is stood in for: `scontrol`, `srun` and
`scancel` below are small shell commands that do what Slurm's do with tasks and signals, on one host whose addresses
127.0.0.2, 127.0.0.3, … are the nodes. References: the agents' events, and the modes of the files."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.agent.processes import PATIENCE_S, Life, Network, network
from tests.deploy.tools import DEPLOY, ROOT, program

pytestmark = pytest.mark.live

SCRIPT = DEPLOY / "slurm" / "dimat.sbatch"
SCONTROL = """#!/bin/sh
case "$1 $2" in
    "show hostnames") echo "$3" | tr , '\\n' ;;
    requeue*) echo "$2" >>"$STAND_IN/requeued" ;;
    *) exit 1 ;;
esac
"""
# like Slurm's: a task per node; the highest exit code, but a signal's before all others; SIGTERM to srun itself has the
# tasks killed, unless the whole job is being ended
SRUN = """#!/bin/bash
while [ "${1#--}" != "$1" ]; do shift; done
: >"$STAND_IN/tasks"
trap '[ -e "$STAND_IN/completing" ] || kill -KILL $(cat "$STAND_IN/tasks")' TERM HUP
for node in ${SLURM_JOB_NODELIST//,/ }; do
    SLURMD_NODENAME=$node DIMAT_AGENT__LISTEN=$node:$DIMAT_LISTEN_PORT "$@" &
    echo $! >>"$STAND_IN/tasks"
done
highest=0
killed=""
for task in $(cat "$STAND_IN/tasks"); do
    wait "$task"
    code=$?
    while kill -0 "$task" 2>/dev/null; do # a signal ended `wait`
        wait "$task"
        code=$?
    done
    [ $code -ne 137 ] || killed=$code
    [ $code -le $highest ] || highest=$code
done
exit ${killed:-$highest}
"""
# like Slurm's: it signals the tasks, and refuses that once the whole job is being ended
SCANCEL = """#!/bin/sh
[ "$*" = "--quiet --signal=TERM 42" ] || exit 1
[ ! -e "$STAND_IN/completing" ] || exit 1
kill -TERM $(cat "$STAND_IN/tasks")
"""


class Cluster:
    """A folder with the stand-ins, from which jobs are started."""

    def __init__(self, net: Network) -> None:
        self.net = net
        self.bin = program(net.folder / "bin")
        for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("scancel", SCANCEL)):
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        with socket.create_server(("127.0.0.2", 0)) as taken:
            self.port = taken.getsockname()[1]

    def submit(self, nodes: Sequence[str], *words: str) -> Life:
        """Start the script as a job on these nodes; its agents' folders are the network's."""
        environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "STAND_IN": str(self.net.folder),
            "SLURM_JOB_ID": "42",
            "SLURM_SUBMIT_DIR": str(self.net.folder),
            "SLURM_JOB_NODELIST": ",".join(nodes),
            "DIMAT_ISSUE_KEYS": str(DEPLOY / "issue-keys.sh"),
            "DIMAT_LISTEN_PORT": str(self.port),
            "PYTHONPATH": str(ROOT),
        }
        said = self.net.folder / f"job.{len(self.net.lives)}.out"
        with said.open("wb") as stream:
            process = subprocess.Popen(
                [SCRIPT, "agents.toml", *words],
                cwd=self.net.folder,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        life = Life("job", process, said)
        self.net.lives.append(life)
        return life

    def tasks(self) -> list[int]:
        """Return the processes of the job's tasks, in the order of the nodes."""
        return [int(line) for line in (self.net.folder / "tasks").read_text().split()]

    def cancel(self, job: Life) -> None:
        """End a job as `scancel JOBID` does: SIGTERM to the tasks, and to the script and its srun."""
        (self.net.folder / "completing").touch()
        os.killpg(job.process.pid, signal.SIGTERM)

    def end(self) -> None:
        """Kill whatever tasks are left."""
        for life in self.net.lives:
            try:
                os.killpg(life.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            life.process.wait()


def without_map(net: Network) -> None:
    """Leave the map out of the agents' file: the script says where it is."""
    agents = net.folder / "agents.toml"
    agents.write_text(agents.read_text().replace('[topology]\nmap = "map.toml"\n', ""))


def test_a_job_its_time_limit_and_its_second_life(tmp_path: Path) -> None:
    """One agent per node trains and merges with keys; before the time limit all leave in good order and the job is
    requeued, though one was killed; on other nodes all go on from their checkpoints; cancelled, all leave in good order
    again, and the job is not requeued; nor is it after SIGTERM to the script alone."""
    names = ("agent-0", "agent-1", "agent-2")
    with network(tmp_path, names, (1, 1, 1), schedule="rounds = 0\nround_deadline_s = 30") as net:
        without_map(net)
        work = tmp_path / "dimat-42"
        for name in names:
            (tmp_path / name).symlink_to(work / "agents" / name, target_is_directory=True)
        cluster = Cluster(net)

        def left(*counts: int) -> bool:
            """Say whether agents have left in good order so many times, and not otherwise."""
            told = [[event["reason"] for event in net.events(name, "AgentLeft")] for name in names]
            return told == [["stopped"] * count for count in counts]

        try:
            job = cluster.submit(("127.0.0.2", "127.0.0.3", "127.0.0.4"))
            net.until(lambda: all(net.partners(name) == set(names) for name in names), "all merge with all")
            assert all(event["secure"] for event in net.events("agent-0", "AgentStarted"))
            check_private(work, names)
            keys = {path: path.read_bytes() for path in work.glob("keys/**/*.*")}
            os.kill(cluster.tasks()[2], signal.SIGKILL)
            job.signal(signal.SIGUSR1)
            assert job.wait() == 0, job.text()
            assert (tmp_path / "requeued").read_text() == "42\n"
            assert left(1, 1, 0)

            second = cluster.submit(("127.0.0.5", "127.0.0.6", "127.0.0.2"))
            for name in names:
                net.wait_for(name, "Resumed")
            since = {name: len(net.events(name, "Merged")) for name in names}
            net.until(lambda: all(len(net.events(name, "Merged")) > since[name] for name in names), "they go on")
            assert '"127.0.0.6:' in (work / "map.toml").read_text()
            assert {path: path.read_bytes() for path in keys} == keys
            cluster.cancel(second)
            assert second.wait() == 143, second.text()
            assert left(2, 2, 1)

            (tmp_path / "completing").unlink()
            third = cluster.submit(("127.0.0.2", "127.0.0.3", "127.0.0.4"))
            for name in names:
                net.wait_for(name, "Resumed", 2)
            third.signal(signal.SIGTERM)
            assert third.wait() == 143, third.text()
            assert left(3, 3, 2)
            assert (tmp_path / "requeued").read_text() == "42\n"
        finally:
            cluster.end()


def check_private(work: Path, names: Sequence[str]) -> None:
    """Nobody else reads anything below the job's folder; private keys are their owner's alone."""
    assert stat.S_IMODE(work.stat().st_mode) == 0o700
    for name in (*names, "."):
        assert not stat.S_IMODE((work / "keys" / name).stat().st_mode) & 0o077
    keys = list(work.glob("keys/**/*.key"))
    assert len(keys) == len(names) + 1
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in keys)


def test_a_job_that_ends_by_itself_or_cannot_begin(tmp_path: Path) -> None:
    """After the last round the job ends with 0; with a setting that is none it ends with the agents' code, and is not
    requeued; words after the file reach every agent."""
    names = ("agent-0", "agent-1")
    with network(tmp_path, names, (1, 1)) as net:
        without_map(net)
        for name in names:
            (tmp_path / name).symlink_to(tmp_path / "dimat-42" / "agents" / name, target_is_directory=True)
        cluster = Cluster(net)
        try:
            nodes = ("127.0.0.2", "127.0.0.3")
            job = cluster.submit(nodes, "--set", "schedule.rounds=1", "--quiet")
            assert job.wait() == 0, job.text()
            assert [net.partners(name) for name in names] == [set(names)] * 2
            wrong = cluster.submit(nodes, "--set", "schedule.round=1")
            assert wrong.wait() == 2, wrong.text()
            assert "schedule.round" in wrong.text()
            assert not (tmp_path / "requeued").exists()
        finally:
            cluster.end()


def test_outside_of_slurm(tmp_path: Path) -> None:
    """One line that says how to submit it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    done = subprocess.run(
        [SCRIPT, "agents.toml"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "sbatch deploy/slurm/dimat.sbatch" in line
