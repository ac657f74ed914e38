"""A configuration resolved: the simulator and every agent come to the same experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dimat.agent.doctor.doctor import examine
from dimat.agent.setup.experiment import resolve
from dimat.agent.setup.loaded_task import load_for
from dimat.agent.setup.prepare import prepare_agent
from dimat.config import ExperimentConfig
from dimat.errors import ConfigError, HookError, PartitionError, TopologyError
from dimat.simulate.world.scenario import prepare
from tests.simulate.helpers import TINY_TASK, tiny_experiment

MAP = """
graph = "complete"
mixing = "samples"
agents = [{ name = "a", samples = 30 }, { name = "b", samples = 10 }]
"""
SKEWED = {"hook": "tiny_task.py:task", "partition": {"kind": "dirichlet", "alpha": 0.4}}


def one_of(folder: Path, name: str = "agent-1", **changes: Any) -> ExperimentConfig:
    return tiny_experiment(folder, agent={"name": name, "insecure": True}, **changes)


def test_the_simulator_and_an_agent_resolve_the_same(tmp_path: Path) -> None:
    """Parts, weights by sample count, rules and rounds are equal where the configuration splits one data set."""
    topology = {"graph": "path", "agents": 3, "mixing": "samples"}
    config = one_of(tmp_path, topology=topology, task=SKEWED, merge={"method": "average"}, schedule__final_merge=True)
    simulated, agent = prepare(config), prepare_agent(config).experiment
    assert simulated.agents == agent.agents == ("agent-0", "agent-1", "agent-2")
    assert simulated.counts == agent.counts
    assert len(set(simulated.counts.values())) > 1
    assert sum(simulated.counts.values()) == 160
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(simulated.parts, agent.parts, strict=True))
    assert torch.equal(prepare_agent(config).indices, simulated.parts[1])
    assert simulated.schedule.rules() == agent.schedule.rules()
    assert simulated.schedule.rounds == agent.schedule.rounds > 3
    for name in simulated.agents:
        for number in range(1, simulated.schedule.rounds + 1):
            assert simulated.schedule.round_plan(name, number) == agent.schedule.round_plan(name, number)
    # metropolis would give thirds; by hand, the middle one hears all
    counts = simulated.counts
    assert simulated.schedule.round_plan("agent-1", 1).mixing == pytest.approx({k: n / 160 for k, n in counts.items()})


def test_agents_with_data_of_their_own(tmp_path: Path) -> None:
    """Without task.partition an agent trains on all that it has, and a simulation still splits one data set."""
    config = one_of(tmp_path, merge={"method": "average"})
    prepared = prepare_agent(config)
    assert prepared.experiment.parts == ()
    assert prepared.experiment.counts == {}
    assert torch.equal(prepared.indices, torch.arange(160))
    assert sum(prepare(config).counts.values()) == 160


def test_sample_counts_of_a_map(tmp_path: Path) -> None:
    """A map's counts weigh agents with data of their own, simulated too; those of the parts win where data are split;
    without any, mixing by samples cannot be."""
    (tmp_path / "map.toml").write_text(MAP)
    topology = {"map": "map.toml"}
    own = one_of(tmp_path, "a", topology=topology, merge={"method": "average"})
    for experiment in (prepare_agent(own).experiment, prepare(own)):
        assert experiment.schedule.round_plan("a", 1).mixing == {"a": 0.75, "b": 0.25}
    split = one_of(tmp_path, "a", topology=topology, task=SKEWED, merge={"method": "average"})
    for experiment in (prepare_agent(split).experiment, prepare(split)):
        weights = {name: count / 160 for name, count in experiment.counts.items()}
        assert experiment.schedule.round_plan("a", 1).mixing == pytest.approx(weights)
    (tmp_path / "map.toml").write_text(MAP.replace(", samples = 10", ""))
    with pytest.raises(TopologyError, match="samples"):
        prepare_agent(own)


def test_the_ceiling_is_one_model_on_all_data(tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path, merge={"method": "centralised"}, topology={"agents": 4, "mixing": "samples"})
    scenario = prepare(config)
    assert scenario.agents == ("centralised",)
    assert torch.equal(scenario.part("centralised"), torch.arange(160))
    assert not scenario.schedule.exchanges
    with pytest.raises(ConfigError, match='"centralised" has no agents'):
        prepare_agent(one_of(tmp_path, merge={"method": "centralised"}))


def test_faults_are_worded_alike_for_simulator_and_agent(tmp_path: Path) -> None:
    """A hook that fails, and more agents than samples: one message each, whoever resolves."""
    broken = one_of(tmp_path, task=SKEWED)
    (tmp_path / "broken.py").write_text(
        TINY_TASK + "\n\nclass Broken:\n    name, metric, classes = 'broken', 'm', ()\n"
        "    build_model = example_inputs = loss = metrics = None\n"
        "    def data(self, split):\n        raise OSError('no disk')\n"
    )
    broken = broken.model_copy(update={"task": broken.task.model_copy(update={"hook": "broken.py:Broken"})})
    crowd = one_of(tmp_path, topology={"graph": "ring", "agents": 500}, task=SKEWED)
    for config, kind, message in (
        (broken, HookError, "task broken failed: OSError: no disk; mend its code"),
        (crowd, PartitionError, "500 agents cannot share 160 training samples; use fewer agents or more data"),
    ):
        for make in (prepare, prepare_agent):
            merge = config.merge.model_copy(update={"method": "average"})
            with pytest.raises(kind) as caught:
                make(config.model_copy(update={"merge": merge}))
            assert str(caught.value) == message


def test_what_may_be_meant_of_a_task_is_told_by_simulator_agent_and_doctor(tmp_path: Path) -> None:
    """A training set of one class; with the hook that it is of."""
    (tmp_path / "one_class.py").write_text(
        TINY_TASK.replace("y = (x[:, :3]", "y = 0 * (x[:, :3]").replace("+ 2 *", "+ 0 *")
    )
    config = one_of(tmp_path, task={"hook": "one_class.py:task"}, merge={"method": "average"})
    note = 'one_class.py:task: task tiny: data("train"): all 160 examples are of class 0'
    assert note in prepare(config).warnings
    assert prepare_agent(config).experiment.loaded.notes == (note,)
    assert [check.level for check in examine(config) if check.what == note] == ["warn"]


def test_symmetry_groups_are_loaded_where_the_merge_rests_on_them(tmp_path: Path) -> None:
    """One process loads a task once; an experiment gets the groups only if its merge needs them and they are asked
    for."""
    aligned, plain = tiny_experiment(tmp_path), tiny_experiment(tmp_path, merge={"method": "average"})
    asked = load_for(aligned)
    assert asked.spec is not None
    assert load_for(aligned).spec is asked.spec
    assert load_for(aligned, symmetry=False).spec is None
    assert load_for(plain).spec is None
    assert load_for(plain).task is asked.task
    assert load_for(plain).observers is asked.observers


def test_the_map_of_now_leaves_the_prepared_one_alone(tmp_path: Path) -> None:
    """What an agent reads of its map later is handed out, and what it was prepared with stays."""
    (tmp_path / "map.toml").write_text(MAP)
    prepared = prepare_agent(one_of(tmp_path, "a", topology={"map": "map.toml"}, merge={"method": "average"}))
    more = MAP.replace("]", ', { name = "c", samples = 40 }]')
    (tmp_path / "map.toml").write_text(more)
    assert prepared.schedule_now().agents == ("a", "b", "c")
    assert prepared.schedule_on(tmp_path / "map.toml").agents == ("a", "b", "c")
    assert prepared.schedule.agents == ("a", "b")
    assert resolve(prepared.config, prepared.experiment.loaded).agents == ("a", "b", "c")
