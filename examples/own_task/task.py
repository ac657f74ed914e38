"""A task of one's own: readings of six sensors in a CSV file, a small torch model, four states of a machine."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor, nn

from dimat.errors import DataError
from dimat.tasks import ClassificationTask, TensorData, seeded

STATES = ("idle", "normal", "worn", "faulty")
TEST, PROBE = 200, 100


class Net(nn.Module):
    """Any torch module will do; dimat finds out by itself which of its units may be permuted."""

    def __init__(self, sensors: int, states: int, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(sensors, width)
        self.norm = nn.BatchNorm1d(width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, states)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.last(torch.relu(self.second(x)))


def task(*, data: str = "readings.csv", width: int = 32, folder: Path = Path()) -> ClassificationTask:
    """Return the task. Keyword arguments are `task.options`; `folder` is that of the experiment file.

    The last rows are for testing and for the probe set, on which networks are compared.
    """
    readings, states = read(folder / data)
    inputs = (readings - readings.mean(0)) / readings.std(0)
    parts = torch.arange(len(states)).split([len(states) - TEST - PROBE, TEST, PROBE])
    train, test, probe = (TensorData(inputs[part], states[part]) for part in parts)
    model = seeded(lambda: Net(inputs.shape[1], len(STATES), width))
    return ClassificationTask("machine", model, train, test, probe, STATES)


def read(file: Path) -> tuple[Tensor, Tensor]:
    """Return readings (N, sensors) float32 and states (N,) int64 of a CSV file whose last column names the state."""
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.reader(stream))[1:]
        readings = torch.tensor([[float(value) for value in row[:-1]] for row in rows])
        return readings, torch.tensor([STATES.index(row[-1]) for row in rows])
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}") from error
