"""An agent beside somebody's own training loop. References: the same daemon in a process of its own as the peer, plain
torch loops."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dimat
from dimat import events
from dimat.agent.attach import Agent
from dimat.cli.agent import load_agent
from dimat.errors import ConfigError, DataError
from tests.agent.own_loop import STEPS, examples, experiment, learn, network
from tests.forks import start

pytestmark = pytest.mark.live


def test_two_loops_merge_each_other(tmp_path: Path, free_ports: list[int]) -> None:
    """Two loops in two processes end with one network in one basis; each merge took both, and metrics come from the
    user's function."""
    file = experiment(tmp_path, dict(zip("ab", free_ports)))
    loops = [
        start(
            ["-m", "tests.agent.own_loop", str(file), name, str(seed), str(tmp_path / name)], env=os.environ, stderr=2
        )
        for seed, name in enumerate("ab")
    ]
    assert [loop.wait(timeout=200) for loop in loops] == [0, 0]
    for name in "ab":
        told = json.loads((tmp_path / name / "told.json").read_text())
        assert told["steps"] == 3 * STEPS
        merges = [fact for fact in told["events"] if fact["event"] == "Merged"]
        assert [fact["round"] for fact in merges] == [1, 2, 3]
        assert all({part["agent"] for part in fact["contributions"]} == {"a", "b"} for fact in merges)
        assert all(0 <= fact["after"]["accuracy"] <= 1 for fact in merges)
        assert [fact["reason"] for fact in told["events"] if fact["event"] == "AgentLeft"] == ["done"]
    # equal weights in one basis: after the last merge both hold the mean
    a, b = (load_file(tmp_path / name / "parameters.safetensors") for name in "ab")
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)


def test_workers_of_a_loader_are_forked_beside_the_agent(tmp_path: Path, free_ports: list[int]) -> None:
    """Each epoch starts new worker processes, while gRPC's threads run; with its fork handlers on they die in them."""
    file = experiment(tmp_path, dict(zip("ab", free_ports)))
    loops = [
        start(
            ["-m", "tests.agent.own_loop", str(file), name, str(seed), str(tmp_path / name), "2"],
            env=os.environ,
            stderr=2,
        )
        for seed, name in enumerate("ab")
    ]
    assert [loop.wait(timeout=250) for loop in loops] == [0, 0]
    for name in "ab":
        told = json.loads((tmp_path / name / "told.json").read_text())
        merges = [fact for fact in told["events"] if fact["event"] == "Merged"]
        assert [{part["agent"] for part in fact["contributions"]} for fact in merges] == [{"a", "b"}] * 3


def test_alone_then_resumed(tmp_path: Path, free_ports: list[int]) -> None:
    """Without a living peer rounds end by the deadline; another object goes on from the checkpoint, optimizer too."""
    schedule = "rounds = 2\nround_deadline_s = 0.5"
    file = experiment(tmp_path, dict(zip("ab", free_ports)), schedule=schedule)
    options = (f"agent.folder='{tmp_path / 'a'}'", "agent.linger_s=0.1")
    model, data = network(0), examples(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with Agent(file, options, name="a").attach(model, optimizer, data=[data]) as agent:
        assert learn(agent, model, optimizer, data) == 2 * STEPS
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    again = network(7)
    fresh = torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9)
    told: list[events.Event] = []
    resumed = Agent(file, (*options, "schedule.rounds=3"), name="a").attach(again, fresh, data=[data])
    resumed.listeners.append(told.append)
    with resumed as agent:
        assert all(torch.equal(held[name], tensor) for name, tensor in again.state_dict().items())
        for before, parameter in zip(moments, again.parameters(), strict=True):
            assert torch.equal(fresh.state[parameter]["momentum_buffer"], before)
        assert learn(agent, again, fresh, data) == STEPS
    assert any(isinstance(fact, events.Resumed) for fact in told)


def test_leaving_early_and_faults(tmp_path: Path, free_ports: list[int]) -> None:
    """An own loop may leave in the middle; what is wrong is said where the user looks."""
    file = experiment(tmp_path, dict(zip("ab", free_ports)))
    model = network(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = (f"agent.folder='{tmp_path / 'a'}'",)
    with Agent(file, options, name="a").attach(model, optimizer, data=[torch.randn(8, 6)]) as agent:
        agent.step()
        assert not agent.done
        assert agent.round == 1
    assert agent.done
    with pytest.raises(ConfigError, match="steps_per_round"):
        Agent(experiment(tmp_path, dict(zip("ab", free_ports)), train="batch_size = 4"), name="a")
    with pytest.raises(ConfigError, match="inside"):
        dimat.Agent(experiment(tmp_path, dict(zip("ab", free_ports))), name="a").step()
    stranger = torch.optim.SGD(network(1).parameters(), lr=0.1)
    with pytest.raises(DataError, match="fewer than two"):
        Agent(file, options, name="a").attach(model, optimizer, data=[])
    with pytest.raises(ConfigError, match="not the model's"):
        Agent(file, options, name="a").attach(model, stranger, data=[torch.randn(8, 6)])


def test_what_is_wrong_is_told_before_the_first_round(tmp_path: Path) -> None:
    """Data that the model cannot take, and an `evaluate` that returns no metrics, or not the one that counts. Where
    merges need no data it is a warning: they may be of use to somebody else."""
    inputs, targets = examples(0)
    file = experiment(tmp_path, {"a": 1, "b": 2}, merge='method = "average"', agent="insecure = true")
    repaired = ('merge.repair="batchnorm"',)
    model = network(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(DataError, match=r"data: the model cannot take \(4,\) int64: RuntimeError: .*the last entry is"):
        Agent(file, repaired, name="a").attach(model, optimizer, data=[(targets, inputs)])
    with pytest.warns(UserWarning, match=r"the model cannot take .* Merges by this method do not need them"):
        Agent(file, name="a").attach(model, optimizer, data=[(targets, inputs)])
    for found, message in (
        ([0.5], "evaluate returned a list"),
        ({"accuracy": "high"}, "accuracy is not a single number"),
    ):
        with pytest.raises(ConfigError, match=message):
            Agent(file, name="a").attach(model, optimizer, data=[inputs], evaluate=lambda _, found=found: found)
    with pytest.raises(
        ConfigError, match=r"evaluate returned loss, but merge.accept or schedule.target needs accuracy"
    ):
        Agent(file, ('merge.accept="no-worse"',), name="a").attach(
            model, optimizer, data=[inputs], evaluate=lambda _: {"loss": 1.0}
        )
    assert model.training


@pytest.mark.parametrize("name", ['lab "a"', "lab\\a", "lab\\u0041", "лаб \U0001f600", "lab\x7f"])
def test_a_name_is_taken_as_it_is(tmp_path: Path, name: str) -> None:
    """Quotes, backslashes and what TOML cannot hold bare: the name in the configuration is the one that was given."""
    file = experiment(tmp_path, {"a": 1})
    assert Agent(file, name=name).config.agent.name == load_agent(file, name).agent.name == name


def test_what_a_configuration_cannot_take_is_refused(tmp_path: Path) -> None:
    """A ready configuration is used as it is; a name or overrides beside it are not passed over in silence."""
    config = load_agent(experiment(tmp_path, {"a": 1}), "a")
    assert Agent(config).config is config
    with pytest.raises(ConfigError, match="set them in the ExperimentConfig"):
        Agent(config, name="b")
    with pytest.raises(ConfigError, match="set them in the ExperimentConfig"):
        Agent(config, ["seed=3"])
