"""What the simulator costs beyond the training and mixing that it is for.

Five agents on a ring with 2,000 samples of MNIST shape each, an MLP 784-256-128-10, three rounds of one epoch,
batch 64, Adam 1e-3, method `average`. Reference: a plain torch loop in one process that trains five models and
mixes them with the same weights. Both on one thread, in CPU-seconds; evaluation, checkpoints and imports are left
out on both sides. Snapshots (recording, hashing, reading) are the simulator's work and are counted.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from _common import Result, finish, options, table
from _plain_loop import AGENTS, BATCH, ROUNDS, SIZES, mnist_shaped, plain_loop

from dimat.config import ExperimentConfig, build
from dimat.simulate.engines.pool import WorkerPool
from dimat.simulate.folder import RunFolder
from dimat.simulate.simulation import Simulation
from dimat.simulate.world.scenario import prepare
from dimat.tasks import ClassificationTask, TensorData, mlp, seeded


def task() -> ClassificationTask:
    """The plain loop's images and labels."""
    images, labels = mnist_shaped()
    data = TensorData(images, labels)
    small = TensorData(images[:64], labels[:64])
    return ClassificationTask(
        name="mnist-shaped",
        model=seeded(lambda: mlp(SIZES)),
        train=data,
        test=small,
        probe=small,
        classes=tuple(map(str, range(10))),
    )


def simulated() -> tuple[float, dict[str, float]]:
    """Simulate the same; return CPU-seconds without checkpoints, and those by activity."""
    config = build(
        ExperimentConfig,
        {
            "topology": {"graph": "ring", "agents": AGENTS},
            "task": {"hook": f"{__file__}:task"},
            "train": {"epochs_per_round": 1, "batch_size": BATCH, "optimizer": {"name": "adam", "lr": 1e-3}},
            "merge": {"method": "average"},
            "schedule": {"rounds": ROUNDS},
            "simulate": {"workers": 1, "evaluate": "none"},
            "folder": "/",
        },
        "the benchmark",
    )
    with tempfile.TemporaryDirectory() as scratch, WorkerPool(1) as pool:
        scenario = prepare(config)
        simulation = Simulation(scenario, RunFolder(Path(scratch) / "run", config), pool)
        start = time.process_time()
        results = simulation.run()
        used = time.process_time() - start
    return used - results.cpu_s["checkpoint"], results.cpu_s


def main() -> None:
    arguments = options(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    repeats = 2 if arguments.quick else 7
    plain_loop(), simulated()  # once uncounted: lazy imports, allocator, caches
    pairs = [(plain_loop(), simulated()) for _ in range(repeats)]
    ratios = [ours / loop for loop, (ours, _) in pairs]
    rows = [(i, loop, ours, ours / loop) for i, (loop, (ours, _)) in enumerate(pairs, 1)]
    table(("pair", "plain loop CPU-s", "simulator CPU-s", "ratio"), rows)
    print("of which in agents:", {k: round(v, 3) for k, v in pairs[-1][1][1].items()})
    ratio = statistics.median(ratios)
    measured = statistics.median(ours for _, (ours, _) in pairs)
    reference = statistics.median(loop for loop, _ in pairs)
    finish(Result("simulator_overhead", measured, reference, ratio, "<= 1.15", ratio <= 1.15))


if __name__ == "__main__":
    main()
