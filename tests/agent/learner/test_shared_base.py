"""The plan of a merge for a task. References: the measured default (docs/results.md), and what is set."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dimat.agent.learner.shared_base import plan_for
from dimat.config import MergeConfig, TaskConfig, build
from dimat.errors import HookError
from dimat.merge import merge_weights, plan_merge
from dimat.tasks import load_task, seeded
from dimat.tasks.classification import ClassificationTask

DIGITS = load_task(TaskConfig(name="digits"))


def planned(merge: dict[str, object], task: object = DIGITS) -> str:
    return plan_for(build(MergeConfig, merge, "the test"), task).combine.name  # pyright: ignore[reportArgumentType]


def with_model(model: object) -> ClassificationTask:
    assert isinstance(DIGITS, ClassificationTask)
    return ClassificationTask("other", seeded(model), DIGITS.train, DIGITS.test, DIGITS.probe, DIGITS.classes)


def test_agents_merge_by_regmean_where_it_pays() -> None:
    """`dimat` on a network with linear layers; not where it is told otherwise, nor any other method, nor where Gram
    matrices would be much larger than the model, or there are none; files are averaged."""
    assert planned({}) == planned({"method": "dimat"}) == "regmean"
    assert planned({"combine": "average"}) == "average"
    assert planned({"combine": "pleas"}) == "pleas"
    for method in ("average", "dpsgd", "dimat-paper"):
        assert planned({"method": method}) == "average"
    assert planned({}, with_model(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 10)))) == "average"
    assert planned({}, with_model(lambda: nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()))) == "average"
    assert plan_merge(MergeConfig()).combine.name == "average"


def test_files_are_averaged_by_dimat() -> None:
    """There are no data to take statistics on. Reference: the mean, of models that need no alignment."""
    own, peer = ({"0.weight": torch.full((2, 2), value)} for value in (1.0, 3.0))
    merged = merge_weights(own, [peer], [0.5, 0.5], "dimat", align="none", repair="none")
    torch.testing.assert_close(merged["0.weight"], torch.full((2, 2), 2.0))


def test_a_model_that_cannot_be_built_is_the_tasks_fault() -> None:
    """Said as everywhere, not as an error of dimat's."""

    def broken() -> nn.Module:
        raise ZeroDivisionError("no units")

    with pytest.raises(HookError, match="no units"):
        planned({}, with_model(broken))
