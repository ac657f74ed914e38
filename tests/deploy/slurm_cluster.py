"""A real Slurm on this one machine: munged, slurmctld, and slurmd on nodes that are hosts of their own, each with its
own network, name, processes and /etc/hosts (namespaces). All its files are in one folder, and all ends with the test.

`with slurm(3) as cluster` gives it; `need_slurm()` skips a test visibly where something is missing. Each node has all
its ports to itself, so that agents listen as they do on a real cluster.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.net.namespaces import Host, hosts, ip, need_namespaces

PATIENCE_S = 150.0  # for whatever must come: generous, since tests share few cores
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo", "unshare", "setpriv")
# a requeued job waits until its old credential has expired (120 s, if not said here), and then for the scheduler
CONFIG = """\
ClusterName=dimat
SlurmctldHost=ctl({controller})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
JobRequeue=1
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# makes a machine of namespaces, and runs a daemon of Slurm there
MACHINE = """\
#!/bin/sh
mount --bind "$1/hosts" /etc/hosts && hostname "$2" || exit 1
shift 2
"$@" &
wait # for all that ends here, as the first process of a machine does
"""


def need_slurm() -> None:
    """Skip a test where there is no Slurm, or nothing to part its nodes with."""
    for name in PROGRAMS:
        if shutil.which(name) is None:
            pytest.skip(f"there is no {name} here: a real Slurm needs Debian's slurm-wlm and munge")
    need_namespaces()


@dataclass
class Cluster:
    """The nodes are node1, node2, …; `said`: what jobs write, for messages of failures."""

    folder: Path
    controller: Host
    nodes: dict[str, Host]
    said: list[Path] = field(default_factory=list)

    def ask(self, *words: str | Path, check: bool = True, cwd: Path | None = None, **env: str) -> str:
        """Run one of Slurm's commands where the controller is; return what it says."""
        done = subprocess.run(
            self.controller.command([str(word) for word in words]),
            cwd=cwd,
            env=self.environment(**env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{words}: {done.stdout}\n{self.told()}"
        return done.stdout

    def environment(self, **more: str) -> dict[str, str]:
        """Return this process's environment, without what is meant for another Slurm."""
        foreign = ("SLURM", "SBATCH", "SRUN", "DIMAT")
        own = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return {**own, "SLURM_CONF": str(self.folder / "slurm.conf"), **more}

    def submit(self, script: Path, *words: str, options: tuple[str, ...], cwd: Path, **env: str) -> str:
        """Submit a script; return the job's number."""
        number = self.ask("sbatch", "--parsable", *options, script, *words, cwd=cwd, **env).split()[-1]
        self.said.append(Path(self.job(number)["StdOut"]))
        return number

    def job(self, number: str) -> dict[str, str]:
        """Return what the controller knows of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.ask("scontrol", "show", "job", number)))

    def idle(self) -> set[str]:
        """Return the nodes on which nothing runs any more, and on which jobs may run."""
        said = self.ask("sinfo", "--noheader", "--Node", "--format=%N %T", check=False)
        return {line.split()[0] for line in said.splitlines() if line.endswith(" idle")}

    def pids(self, node: str, word: str) -> list[int]:
        """Return the processes on a node that have a word in their command line."""
        found = []
        for pid in map(int, ip("netns", "pids", self.nodes[node].name).split()):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue  # it has ended
            found += [pid] * (word.encode() in words)
        return found

    def until(self, true: Callable[[], Any], what: str) -> Any:
        """Wait until something holds, and return it."""
        ends = time.monotonic() + PATIENCE_S
        while not (value := true()):
            assert time.monotonic() < ends, f"it never came: {what}\n{self.told()}"
            time.sleep(0.3)
        return value

    def told(self) -> str:
        """Return the ends of all logs, and of what jobs have said."""
        logs = [path for path in (*sorted(self.folder.glob("*.log")), *self.said) if path.exists()]
        return "\n".join(f"== {log.name}\n" + log.read_text(errors="replace")[-5000:] for log in logs)

    def end(self) -> None:
        """Kill all that runs, and wait until it is gone."""
        for host in (self.controller, *self.nodes.values()):
            host.stop()
            while ip("netns", "pids", host.name).strip():
                time.sleep(0.05)


@contextmanager
def slurm(count: int) -> Generator[Cluster]:
    """Start Slurm with so many nodes, and end it with all that runs there."""
    with ExitStack() as stack:
        # the path of a socket must be short, and munged wants a folder that others may enter
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dimat-slurm-", dir="/tmp")))
        folder.chmod(0o755)
        controller, *machines = stack.enter_context(hosts(count + 1))
        cluster = Cluster(folder, controller, {f"node{at}": host for at, host in enumerate(machines, 1)})
        _write(cluster)
        stack.callback(cluster.end)
        _daemon(cluster, controller, "munged", *_munged(folder))
        cluster.until((folder / "munge.socket").exists, "munged listens")
        _daemon(cluster, controller, "slurmctld", *_machine(folder, "ctl"), "slurmctld", "-D", "-c")
        for name, host in cluster.nodes.items():
            _daemon(cluster, host, name, *_machine(folder, name), "slurmd", "-D")
        cluster.until(lambda: cluster.idle() == set(cluster.nodes), "all nodes are idle")
        yield cluster


def _write(cluster: Cluster) -> None:
    folder, nodes = cluster.folder, cluster.nodes
    lines = [f"NodeName={name} NodeAddr={host.address} CPUs=8 State=UNKNOWN" for name, host in nodes.items()]
    config = CONFIG.format(folder=folder, controller=cluster.controller.address, nodes="\n".join(lines))
    (folder / "slurm.conf").write_text(config)
    # slurmd does not begin without cgroups, whatever it needs them for, and network namespaces have none
    (folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={folder}/cgroup\n")
    names = {"localhost": "127.0.0.1", "ctl": cluster.controller.address}
    names |= {name: host.address for name, host in nodes.items()}
    (folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in names.items()))
    (folder / "machine.sh").write_text(MACHINE)
    for name in ("state", "cgroup", *(f"spool.{name}" for name in nodes)):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)


def _munged(folder: Path) -> list[str]:
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "seed-file": "munge.seed"}
    return ["munged", "--foreground", "--force", *(f"--{option}={folder / name}" for option, name in files.items())]


def _machine(folder: Path, name: str) -> list[str]:
    """Return the first words of a command that runs on a machine with this name."""
    words = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return [*words, "sh", str(folder / "machine.sh"), str(folder), name]


def _daemon(cluster: Cluster, host: Host, name: str, *words: str) -> None:
    bound = ("setpriv", "--pdeathsig", "KILL", *words)  # tests are killed too
    with (cluster.folder / f"{name}.log").open("wb") as said:
        host.start(bound, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=cluster.environment())
