"""Small experiments for the simulator's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dimat.config import ExperimentConfig, build

TINY_TASK = """
import torch
from dimat.tasks import ClassificationTask, TensorData, mlp, seeded

def task():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(240, 6, generator=generator)
    y = (x[:, :3].sum(1) > 0).long() + 2 * (x[:, 3:].sum(1) > 0).long()
    part = lambda a, b: TensorData(x[a:b], y[a:b])
    return ClassificationTask("tiny", seeded(lambda: mlp((6, 12, 8, 4))), part(0, 160), part(160, 220),
                              part(220, 240), tuple("abcd"))
"""


def tiny_experiment(folder: Path, **changes: Any) -> ExperimentConfig:
    """Three MLPs on a path learn four classes of random points: a whole run takes a fraction of a second."""
    (folder / "tiny_task.py").write_text(TINY_TASK)
    tree: dict[str, Any] = {
        "run": "tiny",
        "topology": {"graph": "path", "agents": 3},
        "task": {"hook": "tiny_task.py:task"},
        "train": {
            "epochs_per_round": 2,
            "batch_size": 16,
            "optimizer": {"name": "adam", "lr": 0.01},
            "initialisation": "own",
        },
        "merge": {"method": "dimat"},
        "schedule": {"rounds": 3},
        "simulate": {"workers": 1},
        "folder": str(folder),
    }
    for key, value in changes.items():
        table, _, name = key.partition("__")
        if name:
            tree[table] = {**tree[table], name: value}
        else:
            tree[table] = value
    return build(ExperimentConfig, tree, "the test")
