"""An agent's sets of examples. References: counts and indices by hand, the task's own probe set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dimat.agent.learner.example_sets import ExampleSets
from dimat.config import MergeConfig
from dimat.errors import DataError
from dimat.merge import plan_merge
from dimat.simulate.world.scenario import prepare
from dimat.tasks import Subset
from dimat.tasks.base import Data, Task
from tests.agent.learner.rounds import merged, trained
from tests.agent.learner.test_learner import agents
from tests.simulate.helpers import tiny_experiment


def sets_of(task: Task, samples: int, **accept: object) -> ExampleSets:
    plan = plan_merge(MergeConfig.model_validate({"method": "average", "repair": "none", **accept}))
    return ExampleSets.of(task, plan, "lab-a", torch.arange(samples), 0)


def test_the_hold_out_is_a_tenth_and_never_trained_on(tmp_path: Path) -> None:
    """Reference: the samples counted; each is in one of both sets, and merges are judged on the hold-out."""
    task = prepare(tiny_experiment(tmp_path)).task
    sets = sets_of(task, 40, accept={"name": "no-worse", "options": {"on": "local"}})
    assert isinstance(sets.own, Subset)
    assert isinstance(sets.hold_out, Subset)
    assert (len(sets.own), len(sets.hold_out)) == (36, 4)
    both = torch.cat([sets.own.indices, sets.hold_out.indices])
    assert both.sort().values.tolist() == list(range(40))
    assert sets.judged() is sets.hold_out
    whole = sets_of(task, 40)
    assert (len(whole.own), whole.hold_out, whole.judged()) == (40, None, None)


def test_too_few_examples_are_told(tmp_path: Path) -> None:
    """An agent with one example has none left to train on beside a hold-out."""
    task = prepare(tiny_experiment(tmp_path)).task
    with pytest.raises(DataError, match=r'agent lab-a has 1 example, which accept = "no-worse"'):
        sets_of(task, 1, accept={"name": "no-worse", "options": {"on": "local"}})
    with pytest.raises(DataError, match=r"the data of agent lab-a has fewer than the two examples \(1\)"):
        sets_of(task, 1, repair="batchnorm")


@pytest.mark.parametrize(("wanted", "given"), [(7, 7), (10_000, None)])
def test_networks_are_compared_on_so_many_probe_samples(
    wanted: int, given: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the first `merge.probe_samples` of the task's probe set, all of it where it has fewer."""
    one, two = agents(tmp_path, merge={"method": "dimat", "align_data": "probe", "probe_samples": wanted})
    probe = one.task.data("probe")
    peer = trained(two, 1, learn=True).payload
    trained(one, 1, learn=True)
    seen: list[Data] = []
    batches = one.trainer.input_batches
    monkeypatch.setattr(one.trainer, "input_batches", lambda data, *rest: seen.append(data) or batches(data, *rest))
    merged(one, 1, 0.5, [("two", one.store / f"{peer.root}.safetensors", 0.5, True)], "none")
    assert seen
    first = torch.arange(given or len(probe))
    for data in seen:
        assert len(data) == len(first)
        torch.testing.assert_close(data.batch(first).inputs[0], probe.batch(first).inputs[0], rtol=0, atol=0)
