"""An experiment's settings: what goes together, what does not, and what a method sets in other tables."""

from __future__ import annotations

import ast
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import dimat.config as config_rooms
from dimat.cli.templates.experiment_template import starter as starter_text
from dimat.config import ExperimentConfig, MergeConfig, TopologyConfig, TrainConfig, build, load_experiment
from dimat.errors import ConfigError
from dimat.merge import plan_merge
from dimat.simulate.compare import cases_of


def experiment(**tables: Any) -> ExperimentConfig:
    return build(ExperimentConfig, tables, "x.toml")


def fault(**tables: Any) -> str:
    with pytest.raises(ConfigError) as error:
        experiment(**tables)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"mode": "async", "final_merge": True}, 'use it with mode = "sync"'),
        ({"mode": "async", "mixing_steps": 2}, "mixing_steps needs all agents in the same round; use it with mode"),
        ({"rounds": 0, "final_merge": True}, "rounds = 0 has none; give a number of rounds"),
        ({"rounds": -1}, "x.toml: schedule.rounds: "),
        ({"staleness_decay": 0}, "x.toml: schedule.staleness_decay: "),
        ({"join_wait_s": 0}, "x.toml: schedule.join_wait_s: "),
        ({"target": float("nan")}, "x.toml: schedule.target: "),
        ({"max_time_s": 0}, "x.toml: schedule.max_time_s: "),
        ({"changes": [{"round": 1, "topology": {}}]}, "x.toml: schedule.changes[0].round: "),
        (
            {"changes": [{"round": 3, "topology": {"graph": "star", "edges": [("a", "b")]}}]},
            "x.toml: schedule.changes[0].topology: give one of map, graph, edges",
        ),
        (
            {"changes": [{"round": r, "topology": {"graph": "star"}} for r in (4, 4)]},
            "changes[1] has round 4, the one before it 4; put them in order",
        ),
        (
            {"changes": [{"round": 2, "topology": {"grahp": "star"}}]},
            "unknown key 'schedule.changes[0].topology.grahp' in x.toml; did you mean 'graph'?",
        ),
    ],
)
def test_impossible_schedules(schedule: dict[str, Any], said: str) -> None:
    """Reference: the settings' docstrings; one line that names the key."""
    assert said in fault(schedule=schedule)


def test_settings_of_different_tables_that_exclude_each_other() -> None:
    """Reference: the settings' docstrings. Endless runs alone are fine: Ctrl-C ends them."""
    assert experiment(schedule={"rounds": 0}).schedule.rounds == 0
    for name in ("cosine", "step"):
        message = fault(schedule={"rounds": 0}, train={"lr_schedule": {"name": name}})
        assert f"x.toml: train.lr_schedule {name!r} spans all rounds" in message
    message = fault(schedule={"target": 0.9}, simulate={"evaluate": "none"})
    assert message == 'x.toml: schedule.target needs test metrics, but simulate.evaluate is "none"; use "after"'
    assert experiment(schedule={"target": 0.9}).schedule.target == 0.9


def test_where_a_fault_in_a_list_came_from() -> None:
    """A flag that sets a whole list is named for what is wrong inside it; a table's key is suggested inside lists."""
    with pytest.raises(ConfigError, match=r"^--set schedule\.changes: schedule\.changes\[0\]\.round: "):
        load_experiment(None, ["schedule.changes=[{round=1, topology={}}]"], {})
    changes = load_experiment(None, ['schedule.changes=[{round=5, topology={graph="star"}}]'], {}).schedule.changes
    assert [(change.round, change.topology.graph) for change in changes] == [(5, "star")]


@pytest.mark.parametrize("method", ["dpsgd", "sgp"])
def test_methods_of_one_step(method: str) -> None:
    """Reference: Lian et al. 2017 and Assran et al. 2019 merge after every step. What is given explicitly stands."""
    assert experiment(merge={"method": method}).train.steps_per_round == 1
    assert experiment(merge={"method": method}, train={"batch_size": 8}).train.steps_per_round == 1
    assert experiment(merge={"method": method}, train={"steps_per_round": 4}).train.steps_per_round == 4
    slow = experiment(merge={"method": method}, train={"epochs_per_round": 2}).train
    assert (slow.epochs_per_round, slow.steps_per_round) == (2, None)
    assert experiment(merge={"method": "average"}).train.steps_per_round is None
    in_python = ExperimentConfig(merge=MergeConfig(method=method), train=TrainConfig(batch_size=8)).train
    assert (in_python.steps_per_round, in_python.batch_size) == (1, 8)
    plan = plan_merge(MergeConfig(method=method))
    assert plan == plan_merge(MergeConfig(method="average"))


def test_sgp_mixes_by_push_sum() -> None:
    """Reference: Assran et al. 2019. A map, or who sets the mixing, has the word; another mixing is refused."""
    assert experiment(merge={"method": "dpsgd"}).topology.mixing.name == "metropolis"
    made = experiment(
        merge={"method": "sgp"},
        topology={"graph": "exponential", "agents": 8},
        schedule={"changes": [{"round": 3, "topology": {"graph": "ring"}}]},
    )
    assert (made.topology.mixing.name, made.topology.graph, made.topology.agents) == ("push-sum", "exponential", 8)
    assert made.schedule.changes[0].topology.mixing.name == "push-sum"
    lazy = {"name": "push-sum", "options": {"lazy": 0.5}}
    assert experiment(merge={"method": "sgp"}, topology={"mixing": lazy}).topology.mixing.options == {"lazy": 0.5}
    assert "mixing" not in experiment(merge={"method": "sgp"}, topology={"map": "x.toml"}).topology.model_fields_set
    in_python = ExperimentConfig(merge=MergeConfig(method="sgp"), topology=TopologyConfig(agents=3))
    assert (in_python.topology.mixing.name, in_python.topology.agents) == ("push-sum", 3)
    message = fault(merge={"method": "sgp"}, topology={"mixing": "metropolis"})
    assert message == "x.toml: method \"sgp\" mixes by push-sum, but topology.mixing is 'metropolis'; leave it out"
    changes = [{"round": 3, "topology": {"mixing": {"name": "uniform"}}}]
    assert "schedule.changes[0].topology.mixing" in fault(merge={"method": "sgp"}, schedule={"changes": changes})
    assert "x.toml: train: " in fault(merge={"method": "sgp"}, train=3)


def test_a_configuration_survives_being_written() -> None:
    """Law: dump and load give the same, also for what a preset has set; so results name what was run."""
    made = experiment(
        merge={"method": "sgp"},
        schedule={"changes": [{"round": 3, "topology": {"graph": "star"}}]},
        simulate={
            "network": {"latency_s": [0.1, 0.2], "links": [{"between": ["a", "b"], "loss": 0.1}]},
            "faults": [{"kind": "crash", "agent": "a", "round": 2, "on": "merge"}],
        },
    )
    assert ExperimentConfig.model_validate_json(made.model_dump_json()) == made
    assert build(ExperimentConfig, made.model_dump(), "a dump") == made


def test_methods_compared_are_each_resolved(tmp_path: Path) -> None:
    """A comparison's D-PSGD merges after every step, its other methods keep the experiment's rounds."""
    splits = {"iid": experiment().task.partition}
    cases = cases_of(experiment(), ("average", "dpsgd", "sgp"), splits, (0, 1), tmp_path)
    steps = {(case.method, case.seed): case.config.train.steps_per_round for case in cases}
    assert steps == {(m, s): n for m, n in (("average", None), ("dpsgd", 1), ("sgp", 1)) for s in (0, 1)}
    assert {case.config.topology.mixing.name for case in cases if case.method == "sgp"} == {"push-sum"}
    starter = tmp_path / "experiment.toml"
    starter.write_text(starter_text())
    with pytest.raises(ConfigError, match=r"^the comparison's 'sgp': .* leave it out$"):
        cases_of(load_experiment(starter, env={}), ("average", "sgp"), splits, (0,), tmp_path)


def test_every_setting_says_what_it_is() -> None:
    """Each field of each table has a docstring below it, which a reader of the source and of an editor's help sees."""
    missing: list[str] = []
    tables = 0
    for path in sorted(Path(config_rooms.__file__).parent.glob("*.py")):
        for kind in (
            node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)
        ):
            if not any(isinstance(base, ast.Name) and base.id.endswith(("Tree", "Config")) for base in kind.bases):
                continue
            tables += 1
            for field, below in pairwise([*kind.body, ast.Pass()]):
                said = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and not said:
                    missing.append(f"{path.name}: {kind.name}.{field.target.id}")
    assert missing == []
    assert tables > 20


@pytest.mark.parametrize(
    "listen",
    [
        "127.0.0.1",
        "::1:7300",
        "127.0.0.1:７３００",
        "http://127.0.0.1:7300",
        "a b:7300",
        ":7300",
        "h:65536",
        "h:-1",
        "",
    ],
)
def test_an_address_to_listen_on_is_a_host_and_a_port(listen: str) -> None:
    """Digits of other scripts are read as numbers by Python and by no network."""
    for table in ("agent", "dht"):
        assert f'{table}.listen: must be "host:port"' in fault(**{table: {"listen": listen}})
    assert experiment(agent={"listen": "[fe80::1%eth0]:7300"}).agent.listen == "[fe80::1%eth0]:7300"
