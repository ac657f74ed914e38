"""Simulated runs whose merges rest on statistics: what is sent, what is equal, and what cannot be.

References: the same experiment without statistics, and itself once more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dimat import events
from dimat.errors import ConfigError
from dimat.events import Event
from dimat.simulate import run_simulation
from dimat.weights.tensors import encode
from tests.simulate.helpers import tiny_experiment

METHODS = ("fisher", "regmean")


def run(folder: Path, name: str, **changes: Any) -> tuple[Any, list[Event], dict[str, dict[str, torch.Tensor]]]:
    heard: list[Event] = []
    out = folder / name
    results = run_simulation(tiny_experiment(folder, **changes), out=out, listeners=[heard.append])
    return results, heard, {file.stem: load_file(file) for file in sorted((out / "final").iterdir())}


@pytest.mark.parametrize(("method", "workers"), [("fisher", 2), ("regmean", 1)])
def test_equal_seeds_give_equal_bits(tmp_path: Path, method: str, workers: int) -> None:
    """On one worker and on two; another number of examples gives something else."""
    merge = {"method": "dimat", "combine": method}
    once, _, weights = run(tmp_path, "once", merge=merge, simulate={"workers": 1})
    again, _, others = run(tmp_path, "again", merge=merge, simulate={"workers": workers})
    assert once.status == "done"
    assert once.warnings == []
    assert once.rows == again.rows
    assert all(torch.equal(others[a][k], weights[a][k]) for a in weights for k in weights[a])
    _, _, few = run(tmp_path, "few", merge={**merge, "statistics_samples": 3})
    assert not torch.equal(few["agent-0"]["1.weight"], weights["agent-0"]["1.weight"])


@pytest.mark.parametrize("method", METHODS)
def test_statistics_are_counted_as_bytes(tmp_path: Path, method: str) -> None:
    """A snapshot is as long as is said before the run, and longer than its weights by the statistics; final weights
    have none."""
    results, heard, weights = run(tmp_path, "run", merge={"method": "average", "combine": method})
    sizes = {fact.bytes for fact in heard if isinstance(fact, events.Published)}
    assert sizes == {results.snapshot_bytes}
    own = weights["agent-1"]
    assert not any(name.startswith("aux.") for name in own)
    extra = {f"aux.fisher.{name}": tensor for name, tensor in own.items()}
    if method == "regmean":
        layers = {name: tensor for name, tensor in own.items() if tensor.ndim == 2}
        extra = {f"aux.gram.{name}": torch.zeros(t.shape[1], t.shape[1]) for name, t in layers.items()}
    assert results.snapshot_bytes == len(encode({**own, **extra}))
    assert {row.bytes_sent for row in results.rows if row.agent == "agent-1"} == {2 * results.snapshot_bytes}
    assert results.cpu_s["statistics"] > 0


def test_rounds_without_training_take_statistics_too(tmp_path: Path) -> None:
    """Those of the final merge."""
    merge = {"method": "average", "combine": "fisher"}
    results, heard, _ = run(tmp_path, "run", merge=merge, schedule={"rounds": 2, "final_merge": True})
    assert max(row.round for row in results.rows) > 2
    assert all(row.heard == row.expected for row in results.rows)
    assert not [fact for fact in heard if isinstance(fact, events.PeerRefused | events.Warned)]


NO_LINEAR = """
import torch
from dimat.tasks import ClassificationTask, TensorData, seeded

class Task(ClassificationTask):
    def loss(self, outputs, targets):
        value = super().loss(outputs, targets)
        return value if value.item() > 0 else value * 0

def task():
    x, y = torch.randn(60, 1, 2, 2), torch.arange(60) % 2
    data = [TensorData(x[a:b], y[a:b]) for a, b in ((0, 40), (40, 50), (50, 60))]
    model = lambda: torch.nn.Sequential(torch.nn.Conv2d(1, 2, 2), torch.nn.Flatten())
    return Task("odd", seeded(model), *data, ("a", "b"))
"""


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("regmean", "finds no layer in the model of task odd to compute statistics of"),
        ("fisher", r"'fisher': its statistics cannot be computed for task odd: RuntimeError: .*item"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(tmp_path: Path, method: str, said: str) -> None:
    """A model without linear layers for RegMean; a loss that reads values in Python for Fisher."""
    (tmp_path / "odd.py").write_text(NO_LINEAR)
    config = tiny_experiment(tmp_path, task={"hook": "odd.py:task"}, merge={"method": "average", "combine": method})
    with pytest.raises(ConfigError, match=said) as caught:
        run_simulation(config, out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
