"""Whether an agent's memory grows with its rounds: three real agents with a small model, 2,000 rounds.

Three processes on loopback (mutual TLS), an MLP of 24 kB, two steps a round, merges of three, checkpoints. Anonymous
memory (RssAnon of /proc) is looked at four times a second, and put to rounds by the times in the agents' logs. Slope of
the means of 25 rounds each over the last three quarters of the run, by least squares; reference: 1 kB a round, which
the upper end of the 95 % interval must stay under, for each agent. `--quick`: 120 rounds, whose slope is only shown.

    python benchmarks/agent_memory.py [--rounds N]
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from _agents import start, write_network
from _children import anonymous_kb
from _common import Result, finish, options, table

from dimat.tasks import ClassificationTask, TensorData, mlp, seeded

NAMES = ("lab-a", "lab-b", "lab-c")
LOOK_S = 0.25
BLOCK = 25
"""Rounds whose samples are averaged: neighbours in time are alike, and would count as many."""
TARGET_BYTES = 1000.0
EXPERIMENT = """
[train]
steps_per_round = 2
batch_size = 16
[merge]
method = "average"
[schedule]
rounds = {rounds}
round_deadline_s = 300
[agent]
founder = true
"""


def task() -> ClassificationTask:
    """Random inputs with labels from a linear teacher, and a small network."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(192, 16, generator=generator)
    labels = (inputs @ torch.randn(16, 4, generator=generator)).argmax(1)
    data = TensorData(inputs, labels)
    return ClassificationTask("small", seeded(lambda: mlp((16, 64, 64, 4))), data, data, data, tuple("abcd"))


@dataclass(frozen=True)
class Slope:
    """Of a line through points, by least squares: `upper` ends its 95 % interval; `blocks`: points."""

    slope: float
    upper: float
    blocks: int


def fit(points: list[tuple[float, float]]) -> Slope:
    """Fit a line."""
    n = len(points)
    mx, my = (sum(values) / n for values in zip(*points))
    sxx = sum((x - mx) ** 2 for x, _ in points)
    slope = sum((x - mx) * (y - my) for x, y in points) / sxx
    rest = sum((y - my - slope * (x - mx)) ** 2 for x, y in points)
    error = math.sqrt(rest / max(1, n - 2) / sxx)
    return Slope(slope, slope + 1.96 * error, n)


def measure(folder: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Run the agents to their end; return for each the means of blocks of rounds: middle round and bytes."""
    file = write_network(folder, NAMES, "complete", Path(__file__), EXPERIMENT.format(rounds=rounds))
    agents = {name: start(file, name, folder / name, stdout=subprocess.DEVNULL) for name in NAMES}
    looks: dict[str, list[tuple[float, int]]] = {name: [] for name in NAMES}
    while any(agent.poll() is None for agent in agents.values()):
        for name, agent in agents.items():
            if kb := anonymous_kb(agent.pid):
                looks[name].append((time.time(), kb * 1024))
        time.sleep(LOOK_S)
    assert [agent.returncode for agent in agents.values()] == [0] * len(NAMES)
    found: dict[str, list[tuple[float, float]]] = {}
    for name in NAMES:
        # the log may have been rotated; its newest part alone tells too little
        logs = sorted((folder / name).glob("events*.jsonl*"))
        lines = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
        ends = sorted((each["time_s"], each["round"]) for each in lines if each.get("event") == "RoundFinished")
        blocks: defaultdict[int, list[int]] = defaultdict(list)
        at = 0
        for when, held in looks[name]:
            while at < len(ends) and ends[at][0] < when:
                at += 1
            if 0 < at < len(ends):
                blocks[ends[at][1] // BLOCK].append(held)
        found[name] = [(BLOCK * (block + 0.5), sum(b) / len(b)) for block, b in sorted(blocks.items())]
    return found


def main() -> None:
    """Measure and print a row for each agent."""
    parser = options(__doc__ or "")
    parser.add_argument("--rounds", type=int, help="how many (2,000)")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (120 if arguments.quick else 2000)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), rounds)
    slopes = {name: fit([point for point in points if point[0] > rounds / 4]) for name, points in found.items()}
    table(
        ["agent", "MB after a quarter", "MB at the end", "bytes a round", "upper end", "blocks"],
        [
            (
                name,
                found[name][-slope.blocks][1] / 1e6,
                found[name][-1][1] / 1e6,
                slope.slope,
                slope.upper,
                slope.blocks,
            )
            for name, slope in slopes.items()
        ],
    )
    worst = max(slope.upper for slope in slopes.values())
    met = worst < TARGET_BYTES or arguments.quick
    target = f"upper end of the slope's 95 % interval < {TARGET_BYTES:.0f} bytes a round (not judged in --quick)"
    finish(Result("agent_memory", worst, TARGET_BYTES, worst / TARGET_BYTES, target, met))


if __name__ == "__main__":
    main()
