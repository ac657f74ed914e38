"""Test metrics of a weights file."""

from __future__ import annotations

from pathlib import Path

from dimat.agent.kit import kit_for
from dimat.config import ExperimentConfig
from dimat.errors import DataError
from dimat.merge import open_weights
from dimat.train import Trainer


def evaluate_file(weights: Path, config: ExperimentConfig) -> dict[str, float]:
    """Return loss and metrics of a safetensors file on the test data of the experiment's task.

    Raises DataError where the file is missing, damaged, or not of the task's model.
    """
    opened = open_weights(weights)
    task = kit_for(config, symmetry=False).task
    test = task.data("test")
    trainer = Trainer(task, test, config.train, seed=config.seed)
    try:
        return trainer.evaluate(test, opened)
    except DataError as error:
        raise DataError(f"{weights} does not fit task {task.name}: {error}") from error
