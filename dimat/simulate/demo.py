"""The demo: five agents on a ring, each with its own start and its own part of digits.

The setting is that of the trial in which the shared basis was found: skewed (Dirichlet 0.5) and IID parts, five
epochs alone, then ten rounds of merging and two epochs; and one model trained on all data as the ceiling.
"""

from __future__ import annotations

from pathlib import Path

from dimat.config import (
    ExperimentConfig,
    MergeConfig,
    OptimizerConfig,
    PartitionConfig,
    ScheduleConfig,
    SimulateConfig,
    TaskConfig,
    TopologyConfig,
    TrainConfig,
)
from dimat.simulate.compare import Case, cases_of

METHODS = ("isolated", "average", "dimat-paper", "dimat", "centralised")
SPLITS = {
    "dirichlet-0.5": PartitionConfig(kind="dirichlet", alpha=0.5),
    "iid": PartitionConfig(kind="iid"),
}


def demo_config(rounds: int = 10) -> ExperimentConfig:
    """Return the demo's experiment."""
    return ExperimentConfig(
        run="demo",
        topology=TopologyConfig(graph="ring", agents=5),
        task=TaskConfig(name="digits"),
        train=TrainConfig(
            first_round_epochs=5, epochs_per_round=2, batch_size=32, optimizer=OptimizerConfig(name="adam", lr=2e-3)
        ),
        merge=MergeConfig(method="dimat"),
        schedule=ScheduleConfig(rounds=rounds),
        simulate=SimulateConfig(),
    )


def demo_cases(out: Path, *, quick: bool = False, seeds: int = 3) -> list[Case]:
    """Return the runs of the demo: every method on both splits; quick: one seed, 3 rounds."""
    config = demo_config(3 if quick else 10)
    return cases_of(config, METHODS, SPLITS, range(1 if quick else seeds), out)
