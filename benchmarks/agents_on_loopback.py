"""What five real agents on one host take: five processes, mutual TLS, gRPC on loopback.

The workload of p2pfl's and decentralizepy's users: a ring, 2,000 samples of MNIST shape each, an MLP 784-256-128-10
(235,146 parameters, 0.94 MB), three rounds of one epoch, batch 64, Adam 1e-3, method `average`. Reference for the
bytes: what the ring has to move, 5 x 2 x 3 snapshots in fp32. Imports and set-up (until the last agent listens) are
stated apart: five processes that load torch share the host's cores. As root on Linux the agents run in a network
namespace of their own, so that the bytes of their sockets are all that its loopback carries.

    python benchmarks/agents_on_loopback.py [--encodings]     # --encodings: also bf16, int8 and int8 with deltas
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from _agents import start, write_network
from _children import anonymous_kb
from _common import Result, finish, options, table

from dimat.tasks import ClassificationTask, TensorData, mlp, seeded

AGENTS, SAMPLES, ROUNDS = 5, 2000, 3
SIZES = (784, 256, 128, 10)
NAMES = [f"agent-{i}" for i in range(AGENTS)]
HEADERS_BYTES = 66  # of a packet on loopback: Ethernet, IP, TCP with timestamps
TARGET_S, TARGET_MB, TARGET_RSS_MB, TARGET_IDLE = 10.0, 28.5, 450.0, 0.2
EXPERIMENT = f"""
[train]
epochs_per_round = 1
batch_size = 64
optimizer = {{ name = "adam", lr = 1e-3 }}
initialisation = "shared"
[merge]
method = "average"
[schedule]
rounds = {ROUNDS}
round_deadline_s = 120
[agent]
founder = true
"""
KINDS = {
    "fp32": (),
    "bf16": ("exchange.encoding=bf16",),
    "int8": ("exchange.encoding=int8",),
    "int8 + delta": ("exchange.encoding=int8", "exchange.delta=true"),
}


def task() -> ClassificationTask:
    """Images of MNIST's shape with labels from a random linear teacher."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(AGENTS * SAMPLES + 2000, 784, generator=generator)
    labels = (images @ torch.randn(784, 10, generator=generator)).argmax(1)
    count = AGENTS * SAMPLES
    return ClassificationTask(
        name="mnist-shaped",
        model=seeded(lambda: mlp(SIZES)),
        train=TensorData(images[:count], labels[:count]),
        test=TensorData(images[count:], labels[count:]),
        probe=TensorData(images[:64], labels[:64]),
        classes=tuple(map(str, range(10))),
    )


@dataclass(frozen=True)
class Measured:
    """`start_s`: until all listen; `run_s`: from there to the end of the last one; `mb`: through sockets, None where
    that cannot be told; `payload_mb`: snapshots alone; `anonymous_mb`: the most of one process; `idle`: share of the
    cores' time that no agent used after the start; `accuracy`: mean over the agents."""

    start_s: float
    run_s: float
    mb: float | None
    payload_mb: float
    anonymous_mb: float
    idle: float
    accuracy: float


def measure(file: Path, settings: tuple[str, ...]) -> Measured:
    """Run the five agents to their end."""
    folder = Path(tempfile.mkdtemp(dir=file.parent))
    sets = [word for setting in settings for word in ("--set", setting)]
    before = loopback()
    begun = time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    agents = [start(file, name, folder / name, *sets, **quiet) for name in NAMES]
    peak_kb, listening = 0, 0.0
    cpu_at_start = 0.0
    usage: dict[int, float] = {}
    left = {agent.pid: agent for agent in agents}
    while left:
        for pid in list(left):
            peak_kb = max(peak_kb, anonymous_kb(pid))
            found, code, spent = os.wait4(pid, os.WNOHANG)
            if found:
                usage[pid] = spent.ru_utime + spent.ru_stime
                left[pid].returncode = os.waitstatus_to_exitcode(code)
                del left[pid]
        if not listening and all((folder / name / "status.sock").exists() for name in NAMES):
            listening = time.perf_counter()
            cpu_at_start = sum(map(cpu_s, left)) + sum(usage.values())
        time.sleep(0.02)
    ended = time.perf_counter()
    for agent in agents:
        if agent.returncode:
            raise SystemExit(agent.stderr.read().decode())
    after = loopback()
    metrics, payload = [], 0
    for name in NAMES:
        for line in (folder / name / "events.jsonl").read_text().splitlines():
            event = json.loads(line)
            if event.get("event") == "Merged" and event["round"] == ROUNDS:
                metrics.append(event["after"]["accuracy"])
            if event.get("event") == "SnapshotFetched":
                payload += event["bytes"]
    spent = sum(usage.values()) - cpu_at_start
    cores = os.cpu_count() or 1
    return Measured(
        listening - begun,
        ended - listening,
        None if before is None or after is None else (after - before) / 1e6,
        payload / 1e6,
        peak_kb / 1024,
        1 - spent / ((ended - listening) * cores),
        sum(metrics) / len(metrics),
    )


def cpu_s(pid: int) -> float:
    """Return the CPU-seconds of a process so far."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def loopback() -> int | None:
    """Return the bytes that sockets have put through this namespace's loopback; None where it is shared with others."""
    if os.environ.get("DIMAT_OWN_NAMESPACE") != "1":
        return None
    for row in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = row.partition(":")
        if name.strip() == "lo":
            received, packets = map(int, counts.split()[:2])
            return received - HEADERS_BYTES * packets
    return None


def own_namespace() -> None:
    """Start this program anew in a network namespace of its own, where that is allowed."""
    if "DIMAT_OWN_NAMESPACE" in os.environ:
        return
    again = f'ip link set lo up && exec "{sys.executable}" "$0" "$@"'
    probe = subprocess.run(["unshare", "--net", "ip", "link", "set", "lo", "up"], check=False, capture_output=True)
    os.environ["DIMAT_OWN_NAMESPACE"] = str(int(probe.returncode == 0))
    if probe.returncode == 0:
        os.execvp("unshare", ["unshare", "--net", "sh", "-c", again, *sys.argv])


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--encodings", action="store_true", help="also with other encodings")
    arguments = parser.parse_args()
    own_namespace()
    kinds = list(KINDS) if arguments.encodings else ["fp32"]
    with tempfile.TemporaryDirectory() as scratch:
        file = write_network(Path(scratch), NAMES, "ring", Path(__file__), EXPERIMENT)
        found = {kind: measure(file, KINDS[kind]) for kind in kinds}
    snapshot_mb = sum(a * b + b for a, b in pairwise(SIZES)) * 4 / 1e6
    ideal_mb = AGENTS * 2 * ROUNDS * snapshot_mb
    table(
        ("encoding", "start s", "run s", "MB sockets", "MB snapshots", "/ ideal fp32", "anon MB", "idle", "accuracy"),
        [
            (
                kind,
                m.start_s,
                m.run_s,
                "-" if m.mb is None else m.mb,
                m.payload_mb,
                (m.mb or m.payload_mb) / ideal_mb,
                m.anonymous_mb,
                m.idle,
                m.accuracy,
            )
            for kind, m in found.items()
        ],
    )
    plain = found["fp32"]
    moved = plain.mb if plain.mb is not None else plain.payload_mb
    met = (
        plain.run_s <= TARGET_S
        and moved <= TARGET_MB
        and plain.anonymous_mb <= TARGET_RSS_MB
        and plain.idle < TARGET_IDLE
    )
    target = f"run <= {TARGET_S:g} s, <= {TARGET_MB} MB, <= {TARGET_RSS_MB:g} MB anonymous, idle < {TARGET_IDLE:.0%}"
    finish(Result("agents_on_loopback", moved, ideal_mb, moved / ideal_mb, target, met))


if __name__ == "__main__":
    main()
