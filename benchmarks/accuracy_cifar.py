"""Accuracy after each merge on CIFAR-10: five agents on a ring, each from its own initialisation.

ResNet-20 (width 1) on a class-balanced part of CIFAR-10, IID and Dirichlet 0.5. Every agent trains alone up to the
first merge, once per split and seed; the methods branch off from there and share all else. `centralised` is one
model on all data. Needs cifar10-train.parquet and cifar10-test.parquet (Hugging Face image layout) in --data.

Reference: `average`, in bytes that an agent sends until the network's mean accuracy is that which `average` reaches
at its end, on the Dirichlet split; target: the shared basis (`dimat`) needs no more than half of them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from _common import CACHE, DATA, Result, finish, options, table

from dimat.config import ExperimentConfig, PartitionConfig, build
from dimat.simulate.compare import cases_of, compare
from dimat.ui.terminal.run import ConsoleListener, print_comparison

METHODS = ("isolated", "average", "dimat-paper", "dimat", "centralised")
SPLITS = {"iid": PartitionConfig(kind="iid"), "dirichlet-0.5": PartitionConfig(kind="dirichlet", alpha=0.5)}


def experiment(data: Path, images: int, tests: int, alone: int, rounds: int) -> ExperimentConfig:
    return build(
        ExperimentConfig,
        {
            "run": "cifar",
            "topology": {"graph": "ring", "agents": 5},
            "task": {
                "name": "images",
                "options": {
                    "train": str(data / "cifar10-train.parquet"),
                    "test": str(data / "cifar10-test.parquet"),
                    "model": "resnet20",
                    "limit": images,
                    "test_limit": tests,
                },
            },
            "train": {
                "first_round_epochs": alone,
                "epochs_per_round": 2,
                "batch_size": 64,
                "optimizer": {"name": "adam", "lr": 2e-3},
                "optimizer_state": "fresh",
            },
            "schedule": {"rounds": rounds},
            "simulate": {"evaluate": "after"},
            "folder": "/",
        },
        "the benchmark",
    )


def main() -> int:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the CIFAR-10 parquet files")
    parser.add_argument("--images", type=int, default=2500, help="training images in all (default 2500)")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if not (arguments.data / "cifar10-train.parquet").exists():
        print(f"no cifar10-train.parquet in {arguments.data}; name its folder with --data", file=sys.stderr)
        return 5
    quick = arguments.quick
    base = experiment(
        arguments.data.resolve(),
        images=300 if quick else arguments.images,
        tests=100 if quick else 1000,
        alone=1 if quick else 8,
        rounds=2 if quick else arguments.rounds,
    )
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch, ConsoleListener(sys.stderr) as console:
        seeds = range(1 if quick else arguments.seeds)
        splits = {"dirichlet-0.5": SPLITS["dirichlet-0.5"]} if quick else SPLITS
        cases = cases_of(base, METHODS, splits, seeds, Path(scratch))
        outcome = compare(cases, Path(scratch), listeners=[console])
    comparison = outcome.comparison
    print_comparison(comparison, sys.stdout)
    for split, curves in comparison.splits.items():
        reached = max(curves["average"].after_merge)
        goals = [round(reached * share, 3) for share in (0.8, 0.9, 1.0)]
        print(f"\n{split}: MB sent per agent until mean accuracy is at least …")
        rows = [
            (name, *(f"{mb:.2f}" if (mb := curve.mb_to(goal)) is not None else "-" for goal in goals))
            for name, curve in curves.items()
            if name in ("average", "dimat-paper", "dimat")
        ]
        table(("method", *map(str, goals)), rows)
    curves = comparison.splits["dirichlet-0.5"]
    goal = max(curves["average"].after_merge)
    reference = curves["average"].mb_to(goal) or 0.0
    ours = curves["dimat"].mb_to(goal)
    ratio = ours / reference if ours is not None else float("inf")
    measured = ours if ours is not None else -1.0
    finish(Result("accuracy_cifar", measured, reference, ratio if ours else -1.0, "<= 0.5", ratio <= 0.5))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
