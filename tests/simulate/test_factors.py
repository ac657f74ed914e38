"""The factors that the advisor varies. References: the experiments that options make, resolved by the simulator; epochs
counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dimat.config import ExperimentConfig, build
from dimat.simulate.factors import FACTORS, Option, World, with_settings
from dimat.simulate.world.scenario import prepare
from tests.simulate.helpers import tiny_experiment

CLASSES = {"hook": "tiny_task.py:task", "partition": {"kind": "classes", "classes_per_agent": 2}}


def options(name: str, config: ExperimentConfig) -> list[Option] | str:
    return FACTORS[name].options(config, World.of(prepare(config)))


def labels(name: str, config: ExperimentConfig) -> list[str]:
    found = options(name, config)
    assert not isinstance(found, str), found
    return [option.label for option in found]


def reason(name: str, config: ExperimentConfig) -> str:
    found = options(name, config)
    assert isinstance(found, str)
    return found


def far(folder: Path, **changes: Any) -> ExperimentConfig:
    """Five agents on a ring with two of four classes each."""
    return tiny_experiment(folder, topology={"graph": "ring", "agents": 5}, task=CLASSES, **changes)


@pytest.mark.parametrize("name", list(FACTORS))
def test_one_option_is_the_experiment_as_it_is_and_all_can_be(tmp_path: Path, name: str) -> None:
    """The present option has no settings; each other one makes another experiment, which the simulator takes."""
    config = far(tmp_path)
    found = options(name, config)
    assert not isinstance(found, str)
    assert len([option for option in found if not option.settings]) == 1
    for option in found:
        made = with_settings(config, option.settings, option.label)
        assert (made == config) == (not option.settings)
        assert len(prepare(made).agents) == 5


def test_options_by_name(tmp_path: Path) -> None:
    """Simplest first; what an experiment has beside them comes last."""
    config = far(tmp_path)
    assert labels("start", config) == ["shared", "own"]
    assert labels("combine", far(tmp_path, merge={"method": "dimat", "combine": "ties"})) == [
        "average",
        "pleas",
        "regmean",
        "ties",
    ]
    assert labels("loss", far(tmp_path, train__loss="calibrated")) == ["task", "auto", "calibrated"]
    assert labels("topology", config) == ["as it is", "complete", "base-k", "base-k, exact in 5"]
    assert labels("mixing steps", far(tmp_path, schedule__mixing_steps=2)) == ["1", "2", "3"]
    many = with_settings(config, {"topology.agents": 9, "task.partition": {"kind": "iid"}}, "the test")
    assert labels("topology", many)[1] == "exponential"


def test_logits_are_not_combined_like_weights(tmp_path: Path) -> None:
    """The rest is varied, and each option can be simulated."""
    config = far(tmp_path, merge={"method": "distil"})
    assert "exchanges logits" in reason("combine", config)
    assert "moments go with a mean of weights" in reason("optimizer state", config)
    for name in FACTORS.keys() - {"combine", "optimizer state"}:
        found = options(name, config)
        for option in [] if isinstance(found, str) else found:
            prepare(with_settings(config, option.settings, option.label))


@pytest.mark.parametrize(
    ("train", "rounds", "made"),
    [
        ({"epochs_per_round": 2}, 4, {(4.0, 2), (2.0, 4), (1.0, 8)}),
        ({"epochs_per_round": 2}, 3, {(3.0, 2), (2.0, 3), (1.0, 6)}),
        ({"epochs_per_round": 2}, 1, {(2.0, 1), (1.0, 2)}),
        ({"steps_per_round": 6}, 4, {(12, 2), (6, 4), (3, 8)}),
        ({"steps_per_round": 5}, 4, {(10, 2), (5, 4)}),
    ],
)
def test_rounds_are_cut_otherwise_at_as_much_training(
    tmp_path: Path, train: dict[str, Any], rounds: int, made: set[tuple[float, int]]
) -> None:
    """Rounds × epochs (or steps) is the same for all options."""
    config = tiny_experiment(tmp_path, schedule__rounds=rounds, train=train)
    found = options("local steps", config)
    assert not isinstance(found, str)
    forms = [with_settings(config, option.settings, option.label) for option in found]
    assert {(f.train.epochs_per_round or f.train.steps_per_round, f.schedule.rounds) for f in forms} == made
    assert len({a * b for a, b in made}) == 1


def test_what_is_not_varied_says_why(tmp_path: Path) -> None:
    """Where a factor has one option only, or the task or the merge says it."""
    config = far(tmp_path)
    alike = with_settings(config, {"task.partition": {"kind": "iid"}}, "the test")
    assert "no agent's class shares" in reason("loss", alike)
    ties = far(tmp_path, merge={"method": "dimat", "combine": "ties"})
    assert 'merge.combine is "ties"' in reason("optimizer state", ties)
    asynchronous = far(tmp_path, schedule__mode="async")
    assert 'mode = "sync"' in reason("mixing steps", asynchronous)
    assert "base-k" not in labels("topology", asynchronous)
    complete = with_settings(config, {"topology.graph": "complete"}, "the test")
    assert "all agents are linked" in reason("mixing steps", complete)
    assert "complete" not in labels("topology", complete)
    assert "one way" in reason("topology", with_settings(config, {"topology.agents": 2}, "the test"))
    odd = with_settings(config, {"train.epochs_per_round": None, "train.steps_per_round": 5}, "the test")
    assert "odd number" in reason("local steps", with_settings(odd, {"schedule.rounds": 1}, "the test"))
    based = far(tmp_path, merge={"method": "opcm", "base": {"seed": 0}})
    assert "merge.base" in reason("start", based)


def test_a_task_with_weights_of_its_own_has_one_start(tmp_path: Path) -> None:
    """Its models are equal under every seed, and no constants; a network that the seed draws is not taken for one."""
    config = far(tmp_path)
    assert labels("start", config)
    text = (tmp_path / "tiny_task.py").read_text()
    fixed = "seeded(lambda: (torch.manual_seed(0), mlp((6, 12, 8, 4)))[1])"
    (tmp_path / "fixed_task.py").write_text(text.replace("seeded(lambda: mlp((6, 12, 8, 4)))", fixed))
    assert fixed in (tmp_path / "fixed_task.py").read_text()
    own = with_settings(config, {"task.hook": "fixed_task.py:task"}, "the test")
    assert "weights of its own" in reason("start", own)


def test_settings_leave_what_was_not_given(tmp_path: Path) -> None:
    """Keys that nobody gave stay so, since some of them mean something else once they are given (task.partition)."""
    plain = build(ExperimentConfig, {"train": {"batch_size": 8}, "folder": str(tmp_path)}, "the test")
    made = with_settings(plain, {"train.loss": "task", "schedule.rounds": 3}, "the test")
    assert made.model_fields_set == {"train", "schedule", "folder"}
    assert made.train.model_fields_set == {"batch_size", "loss"}
    assert (made.train.batch_size, made.train.loss.name, made.folder) == (8, "task", str(tmp_path))
