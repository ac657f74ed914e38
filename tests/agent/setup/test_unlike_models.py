"""Agents with models of their own. References: the same entries in a simulation and in each agent's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dimat.agent.setup.loaded_task import load_for
from dimat.agent.setup.prepare import prepare_agent
from dimat.agent.setup.unlike_models import load_each
from dimat.config import ExperimentConfig
from dimat.errors import ConfigError
from dimat.net.compatibility import incompatibility
from dimat.simulate.world.scenario import prepare
from dimat.wire.v1 import peer_pb2 as pb
from tests.simulate.helpers import tiny_experiment


def experiment(folder: Path, *models: dict[str, Any], method: str = "distil", **options: Any) -> ExperimentConfig:
    task = {"name": "digits", "options": {"width": 4, **options}, "models": models, "partition": {"kind": "iid"}}
    return tiny_experiment(folder, task=task, merge={"method": method})


def entry(*agents: str, **options: Any) -> dict[str, Any]:
    return {"agents": agents, "options": options}


MLP = entry("agent-1", model="mlp")


def as_agent(config: ExperimentConfig, name: str) -> ExperimentConfig:
    return config.model_copy(update={"agent": config.agent.model_copy(update={"name": name})})


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ([entry("agent-9", model="mlp")], r"task.models\[0\]: no agent 'agent-9' in the topology"),
        ([MLP, entry("agent-2", modell="mlp")], "no option 'modell'; did you mean 'model'"),
        ([MLP, entry("agent-2", probe=40)], r"task.models\[1\]: its options change the probe set of task digits"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(tmp_path: Path, models: list[dict[str, Any]], says: str) -> None:
    """By the simulator, and by the agent that it is about (whoever is not on the map: by all)."""
    config = experiment(tmp_path, *models)
    for start in (lambda: prepare(config), lambda: prepare_agent(as_agent(config, "agent-2"))):
        with pytest.raises(ConfigError, match=says) as error:
            start()
        assert "\n" not in str(error.value)


def test_data_that_differ_are_named(tmp_path: Path) -> None:
    """Classes, training data, test data: a hook whose options change one of them."""
    (tmp_path / "odd.py").write_text(
        """
from dataclasses import replace
import torch
from dimat.tasks import TensorData
from tiny_task import task as tiny

def task(*, change: str = ""):
    few = TensorData(torch.zeros(50, 6), torch.arange(50) % 4)
    changes = {"classes": {"classes": tuple("abdc")}, "train": {"train": few}, "test": {"test": few}}
    return replace(tiny(), **changes.get(change, {}))
"""
    )
    for change, what in (("classes", "the classes"), ("train", "the training data"), ("test", "the test data")):
        task = {"hook": "odd.py:task", "models": [entry("agent-1", change=change)]}
        (tmp_path / "tiny_task.py").touch()
        config = tiny_experiment(tmp_path, task=task, merge={"method": "distil"})
        with pytest.raises(ConfigError, match=rf"task.models\[0\]: its options change {what} of task tiny"):
            prepare(config)


def test_tasks_are_loaded_once_for_each_model(tmp_path: Path) -> None:
    """And that of the others only where there are others; the ceiling is one model, the experiment's own."""
    config = experiment(tmp_path, MLP)
    loaded = load_for(config, symmetry=False)
    names = ("agent-0", "agent-1", "agent-2")
    assert len(load_each(config, loaded, names)) == 2
    assert len(load_each(config, loaded, ("agent-1",))) == 1
    ceiling = experiment(tmp_path, MLP, method="centralised")
    assert load_each(ceiling, loaded, ("centralised",)) == [loaded]


def test_unlike_agents_greet_each_other(tmp_path: Path) -> None:
    """They compare classes and the probe set, not modules; another probe set or number of kept logits is refused."""
    config = experiment(tmp_path, MLP)

    def profile(config: ExperimentConfig, name: str) -> Any:
        setup = prepare_agent(as_agent(config, name))
        return setup.profile(setup.learner(tmp_path).trainer.model)

    def refusal(one: Any, two: Any) -> str:
        return incompatibility(one, "tiny", pb.HelloRequest(**two.fields("tiny", "b")))

    one, two = profile(config, "agent-0"), profile(config, "agent-1")
    assert one.schema == two.schema
    assert one.settings == two.settings
    assert one.settings.keys() == {"classes", "probe set", "train.optimizer_state", "schedule.mixing_steps"}
    assert refusal(one, two) == refusal(two, one) == ""
    other = dict(one.settings) | {"probe set": "0123"}
    wrong = type(one)(one.schema, one.base, one.encodings, settings=other)
    assert "its logits are of other inputs: its probe set is '0123', here" in refusal(one, wrong)
    kept = tiny_experiment(
        tmp_path,
        task={"name": "digits", "options": {"width": 4}, "models": [MLP], "partition": {"kind": "iid"}},
        merge={"method": "distil", "combine": {"name": "distil", "options": {"keep": 2}}},
    )
    assert "schema" in refusal(one, profile(kept, "agent-0"))
