"""The demo: five agents on a ring, each with its own part of digits, merge in several ways.

The parts are skewed (Dirichlet 0.5) or IID. Agents train five epochs alone, then merge and train two epochs, ten
times; one model trained on all data is the ceiling. All rows use the same loss and the same repair; the label of a
row says if its agents begin with weights of their own.
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
    VariantConfig,
)
from dimat.simulate.compare import Case, cases_of

OWN = {"train": {"initialisation": "own"}}
FORMS = {
    "average-own-starts": {"merge": {"method": "average", "repair": {"name": "batchnorm"}}, **OWN},
    "dimat-paper-own-starts": {"merge": {"method": "dimat-paper"}, **OWN},
    "average-shared-start": {"merge": {"method": "average", "repair": {"name": "batchnorm"}}},
}
"""Rows of the table that are more than a method: name → changes to the demo's experiment."""
ROWS = ("isolated", *FORMS, "dimat", "centralised")
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
            first_round_epochs=5,
            epochs_per_round=2,
            batch_size=32,
            optimizer=OptimizerConfig(name="adam", lr=2e-3),
        ),
        merge=MergeConfig(method="dimat"),
        schedule=ScheduleConfig(rounds=rounds),
        simulate=SimulateConfig(),
        variants=tuple(VariantConfig(name=name, set=change) for name, change in FORMS.items()),
    )


def demo_cases(out: Path, *, quick: bool = False, seeds: int = 3) -> list[Case]:
    """Return the runs of the demo: every row on both splits; quick: one seed, 3 rounds."""
    config = demo_config(3 if quick else 10)
    return cases_of(config, ROWS, SPLITS, range(1 if quick else seeds), out)
