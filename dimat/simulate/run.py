"""One simulated experiment, from configuration to results."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dimat.config import ExperimentConfig, build, load_experiment
from dimat.errors import DataError
from dimat.events import Listener
from dimat.merge import open_weights
from dimat.results import Results
from dimat.simulate.engines.pool import WorkerPool, default_workers
from dimat.simulate.folder import RunFolder
from dimat.simulate.simulation import Simulation
from dimat.simulate.world.scenario import Scenario, prepare
from dimat.tasks import load_task
from dimat.train.trainer import Trainer


def run_simulation(
    config: ExperimentConfig | Mapping[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    listeners: Sequence[Listener] = (),
    overwrite: bool = False,
) -> Results:
    """Simulate an experiment on this host and return its results.

    `config`: an `ExperimentConfig`, the same as nested dictionaries, or the path of a TOML file. `out`: run folder,
    for `results.json` and each agent's final weights; without one, only the returned results are kept.
    `listeners` are called with every event (`dimat.events`). Results depend only on `config`, not on the number of
    worker processes (`simulate.workers`).

    Raises ConfigError for an impossible experiment, DataError for a run folder that cannot be used.

    >>> results = run_simulation({"topology": {"agents": 3}, "schedule": {"rounds": 2}})  # doctest: +SKIP
    >>> results.after_merge()  # doctest: +SKIP
    [0.71, 0.93]
    """
    if isinstance(config, str | Path):
        config = load_experiment(config)
    elif not isinstance(config, ExperimentConfig):
        config = build(ExperimentConfig, config, "the configuration")
    scenario = prepare(config)
    with tempfile.TemporaryDirectory(prefix="dimat-") as scratch:
        folder = RunFolder(Path(out) if out is not None else Path(scratch) / "run", config, overwrite=overwrite)
        return run_scenario(scenario, folder, listeners)


def run_scenario(scenario: Scenario, folder: RunFolder, listeners: Sequence[Listener] = ()) -> Results:
    """Run a prepared experiment into its folder; what `run_simulation` does once both are there."""
    workers = min(scenario.config.simulate.workers or default_workers(), len(scenario.agents))
    with WorkerPool(workers) as pool:
        return Simulation(scenario, folder, pool, listeners).run()


def evaluate_file(weights: Path, config: ExperimentConfig) -> dict[str, float]:
    """Return loss and metrics of a safetensors file on the test data of the experiment's task.

    Raises DataError where the file is missing, damaged, or not of the task's model.
    """
    opened = open_weights(weights)
    task = load_task(config.task, Path(config.folder))
    test = task.data("test")
    trainer = Trainer(task, test, config.train, seed=config.seed, folder=Path(config.folder))
    try:
        return trainer.evaluate(test, opened)
    except DataError as error:
        raise DataError(f"{weights} does not fit task {task.name}: {error}") from error
