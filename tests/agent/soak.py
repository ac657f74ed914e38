"""Churn: real agents that are killed, paused and started again at random, for minutes. Not a test that CI runs:

    python -m tests.agent.soak --minutes 20 --agents 8

At the end: every agent merges with its neighbours again, no process is left behind, nobody's memory has grown by more
than 5 % over its longest life, and all ledgers agree with what was published. Prints a table and a `RESULT` line.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks._children import anonymous_kb
from tests.agent.processes import Life, Network, check_ledgers, network

SCHEDULE = "rounds = 0\nround_deadline_s = 15\njoin_wait_s = 3"
TRAIN = "epochs_per_round = 60\nbatch_size = 8"
SETTLED_S = 60.0  # of a life, before its memory is taken as what it grows from
GROWTH = 0.05


def left_over(folder: Path) -> list[str]:
    """Return the processes that still work for these agents."""
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in words:
            found.append(f"{path.parent.name}: {words.replace(chr(0), ' ')[:80]}")
    return found


def churn(net: Network, seconds: float, draws: random.Random) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Kill, pause and start agents again; return how often what was done, and each one's memory in its longest life."""
    lives: dict[str, Life] = {name: net.start(name) for name in net.names}
    begun = dict.fromkeys(net.names, time.monotonic())
    memory: dict[str, list[int]] = {name: [] for name in net.names}
    longest: dict[str, list[int]] = {name: [] for name in net.names}
    counts = {"kill": 0, "terminate": 0, "pause": 0}
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        time.sleep(draws.uniform(3.0, 9.0))
        for name, life in lives.items():
            if time.monotonic() - begun[name] > SETTLED_S:
                memory[name].append(anonymous_kb(life.process.pid))
        name = draws.choice(list(net.names[1:]))  # the first one is left in peace: its memory tells most
        what = draws.choice(list(counts))
        counts[what] += 1
        life = lives[name]
        assert life.process.poll() is None, f"{name} has ended by itself:\n{life.text()[-2000:]}"
        if what == "pause":
            life.signal(signal.SIGSTOP)
            time.sleep(draws.uniform(1.0, 12.0))
            life.signal(signal.SIGCONT)
            continue
        life.signal(signal.SIGKILL if what == "kill" else signal.SIGTERM)
        # a process that is still importing has no handler yet: the signal itself ends it
        ended = life.wait()
        assert ended in ((-signal.SIGKILL,) if what == "kill" else (143, -signal.SIGTERM)), (
            f"{name}: {ended}\n{life.text()}"
        )
        if len(memory[name]) > len(longest[name]):
            longest[name] = memory[name]
        memory[name] = []
        time.sleep(draws.uniform(0.0, 8.0))
        lives[name], begun[name] = net.start(name), time.monotonic()
    return counts, {name: max(memory[name], longest[name], key=len) for name in net.names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--agents", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    names = [f"agent-{i}" for i in range(arguments.agents)]
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in names]
        ports = [each.getsockname()[1] for each in sockets]
    exchange = "lost_after_s = 3\nidle_s = 5"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with network(folder, names, ports, schedule=SCHEDULE, train=TRAIN, exchange=exchange) as net:
            counts, memory = churn(net, 60 * arguments.minutes, random.Random(arguments.seed))
            since = {name: len(net.events(name, "Merged")) for name in names}
            net.until(
                lambda: all(
                    any(m["heard"] == m["expected"] for m in net.events(name, "Merged")[since[name] :])
                    for name in names
                ),
                "all merge with all their neighbours again",
            )
            running = [life for life in net.lives if life.process.poll() is None]
            for life in running:
                life.signal(signal.SIGTERM)
            assert [life.wait() for life in running] == [143] * len(names)
            check_ledgers(net)
            rounds = {name: len(net.events(name, "Merged")) for name in names}
            heard = {
                name: sum(m["heard"] for m in net.events(name, "Merged"))
                / max(1, sum(m["expected"] for m in net.events(name, "Merged")))
                for name in names
            }
        orphans = left_over(folder)
    growth: dict[str, float] = {}
    print(f"{'agent':10} {'merges':>7} {'heard':>6} {'MB first':>9} {'MB last':>8} {'growth':>7}")
    for name in names:
        seen = memory[name]
        text = f"{name:10} {rounds[name]:7} {heard[name]:6.2f}"
        if len(seen) >= 4:
            first, last = sum(seen[:2]) / 2, sum(seen[-2:]) / 2
            growth[name] = last / first - 1
            text += f" {first / 1024:9.1f} {last / 1024:8.1f} {growth[name]:7.1%}"
        print(text)
    print(f"{counts}, processes left behind: {orphans or 'none'}")
    worst = max(growth.values(), default=0.0)
    met = worst <= GROWTH and not orphans
    result = {"name": "soak", "measured": worst, "reference": 0.0, "ratio": 1 + worst, "target": "<= 5 %", "met": met}
    print("RESULT " + json.dumps(result))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
