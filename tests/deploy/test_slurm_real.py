"""The Slurm script under a real Slurm, as people submit it: `sbatch`, time limit, requeue, `scancel`. Each node is a
machine made of namespaces; only these, and its times, differ from a cluster. References: what Slurm tells of the job,
and the agents' events."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.agent.processes import Network, network
from tests.deploy.slurm_cluster import Cluster, need_slurm, slurm
from tests.deploy.test_slurm import SCRIPT, check_private, without_map
from tests.deploy.tools import DEPLOY, ROOT

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(900)]

KILL_WAIT_S = 30  # Slurm's default, which deploy/slurm/dimat.sbatch names


def submit(cluster: Cluster, net: Network, nodes: int, *words: str) -> str:
    """Submit the script from the network's folder; return the job's number. Its agents' folders are the network's."""
    # a process of its own: one that a fork server starts would be on none of the nodes
    dimat = cluster.folder / "dimat"
    python = shlex.join(["env", f"PYTHONPATH={ROOT}", "OMP_NUM_THREADS=1", sys.executable, "-m", "dimat.cli"])
    dimat.write_text(f'#!/bin/sh\nexec {python} "$@"\n')
    dimat.chmod(0o755)
    env = {"DIMAT": str(dimat), "DIMAT_ISSUE_KEYS": str(DEPLOY / "issue-keys.sh")}
    options = (f"--nodes={nodes}",)
    number = cluster.submit(SCRIPT, "agents.toml", *words, options=options, cwd=net.folder, **env)
    for name in net.names:
        (net.folder / name).unlink(missing_ok=True)
        (net.folder / name).symlink_to(net.folder / f"dimat-{number}" / "agents" / name, target_is_directory=True)
    return number


def go_on(cluster: Cluster, net: Network, names: Sequence[str]) -> None:
    """Wait until agents merge three times more, the last time with these agents."""
    since = {name: len(net.events(name, "Merged")) for name in names}
    cluster.until(
        lambda: all(
            len(net.events(name, "Merged")) > since[name] + 2 and net.partners(name) == set(names) for name in names
        ),
        f"{names} go on",
    )


def reasons(net: Network, name: str) -> list[str]:
    return [event["reason"] for event in net.events(name, "AgentLeft")]


def test_time_limit_requeue_and_cancellation(tmp_path: Path) -> None:
    """One agent per node trains and merges with keys. One is killed, and the others go on. As the time limit nears,
    Slurm's signal stops all in good order, and the job is requeued; on other nodes all go on from their checkpoints.
    scancel ends it for good, with all agents leaving in good order before Slurm would kill them."""
    need_slurm()
    names = ("agent-0", "agent-1", "agent-2")
    with (
        slurm(4) as cluster,
        network(tmp_path, names, (1, 1, 1), schedule="rounds = 0\nround_deadline_s = 10") as net,
    ):
        without_map(net)
        job = submit(cluster, net, 3)
        work = tmp_path / f"dimat-{job}"
        go_on(cluster, net, names)
        assert cluster.job(job)["NodeList"] == "node[1-3]"
        assert all(event["secure"] for name in names for event in net.events(name, "AgentStarted"))
        check_private(work, names)
        keys = {path: path.read_bytes() for path in work.glob("keys/**/*.*")}

        (agent,) = cluster.pids("node3", "agent-2")
        os.kill(agent, signal.SIGKILL)
        go_on(cluster, net, names[:2])
        assert cluster.job(job)["JobState"] == "RUNNING"

        cluster.ask("scontrol", "update", "NodeName=node1", "State=DRAIN", "Reason=test")
        # the script's own --signal: USR1 three minutes before the end, which Slurm looks for every half minute
        hours, minutes, _ = map(int, cluster.job(job)["RunTime"].split(":"))
        cluster.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 3}")
        cluster.until(lambda: cluster.job(job)["Restarts"] == "1", "the job is requeued")
        cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=120")
        assert [reasons(net, name) for name in names] == [["stopped"], ["stopped"], []]

        for name in names:
            cluster.until(lambda name=name: net.events(name, "Resumed"), f"{name} is back")
        go_on(cluster, net, names)
        assert cluster.job(job)["NodeList"] == "node[2-4]"
        assert '"node4:' in (work / "map.toml").read_text()
        assert {path: path.read_bytes() for path in keys} == keys

        asked = time.monotonic()
        cluster.ask("scancel", job)
        cluster.until(lambda: cluster.idle() == {"node2", "node3", "node4"}, "nothing runs any more")
        assert time.monotonic() - asked < KILL_WAIT_S
        assert [reasons(net, name) for name in names] == [["stopped"] * 2, ["stopped"] * 2, ["stopped"]]
        end = cluster.job(job)
        assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("CANCELLED", "1", "143:0")


def test_a_job_that_ends_by_itself_or_cannot_begin(tmp_path: Path) -> None:
    """After the last round the job is complete; with a setting that is none it fails with the agents' code."""
    need_slurm()
    names = ("agent-0", "agent-1")
    with slurm(2) as cluster, network(tmp_path, names, (1, 1)) as net:
        without_map(net)
        done = submit(cluster, net, 2, "--set", "schedule.rounds=1", "--quiet")
        cluster.until(lambda: cluster.job(done)["JobState"] == "COMPLETED", "the job is complete")
        assert [net.partners(name) for name in names] == [set(names)] * 2
        wrong = submit(cluster, net, 2, "--set", "schedule.round=1")
        cluster.until(lambda: cluster.job(wrong)["JobState"] == "FAILED", "the job fails")
        assert cluster.job(wrong)["ExitCode"] == "2:0"
        assert "schedule.round" in (tmp_path / f"dimat-{wrong}.out").read_text()
