"""The bundled digits. Reference: scikit-learn's own loader."""

from __future__ import annotations

import time

import pytest
import torch

from dimat.config import TaskConfig
from dimat.errors import ConfigError
from dimat.tasks import Task, load_task


def test_splits_are_all_of_scikit_learns_digits() -> None:
    from sklearn.datasets import load_digits

    task = load_task(TaskConfig(name="digits"))
    parts = [task.data(split) for split in ("train", "test", "probe")]
    assert [len(part) for part in parts] == [1337, 360, 100]
    rows = torch.cat([part.batch(torch.arange(len(part))).inputs[0] for part in parts]) * 8 + 8
    labels = torch.cat([part.labels for part in parts])
    bundled = load_digits()
    ours = torch.cat([rows.flatten(1).double(), labels[:, None].double()], 1)
    theirs = torch.cat([torch.tensor(bundled.data), torch.tensor(bundled.target)[:, None].double()], 1)
    assert sorted(ours.tolist()) == sorted(theirs.tolist())


def test_test_and_probe_sets_are_stratified_and_fixed() -> None:
    task, again = load_task(TaskConfig()), load_task(TaskConfig())
    assert torch.bincount(task.data("test").labels).tolist() == [36] * 10
    assert torch.bincount(task.data("probe").labels).tolist() == [10] * 10
    for split in ("train", "test", "probe"):
        indices = torch.arange(50)
        assert torch.equal(task.data(split).batch(indices).inputs[0], again.data(split).batch(indices).inputs[0])


def test_it_is_a_task() -> None:
    task = load_task(TaskConfig(name="digits", options={"model": "mlp", "hidden": [16]}))
    assert isinstance(task, Task)
    model = task.build_model(torch.Generator().manual_seed(0))
    outputs = model(*task.example_inputs())
    assert outputs.shape == (2, 10)
    targets = torch.tensor([1, int(outputs[1].argmax())])
    metrics = task.metrics(outputs, targets)
    assert metrics[task.metric].shape == (2,)
    assert metrics["accuracy"][1] == 1
    assert task.loss(outputs, targets).item() == pytest.approx(metrics["nll"].mean().item())
    assert task.classes == tuple("0123456789")


def test_loading_is_fast() -> None:
    load_task(TaskConfig())
    start = time.process_time()
    load_task(TaskConfig())
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(("probe", "length"), [(2, 1435), (500, 937)])
def test_probe_size(probe: int, length: int) -> None:
    task = load_task(TaskConfig(options={"probe": probe}))
    assert (len(task.data("probe")), len(task.data("train"))) == (probe, length)


def test_probe_too_large() -> None:
    with pytest.raises(ConfigError, match="2 to 1000 to spare"):
        load_task(TaskConfig(options={"probe": 1437}))
