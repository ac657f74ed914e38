"""Keys of experiments and the sources of their values. References: the configuration read again from what is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dimat.cli import main
from dimat.config import ExperimentConfig, load_experiment
from dimat.config.keys import all_keys, nearest_paths, settings_of
from dimat.config.load import load_with_origins, read_toml
from dimat.errors import ConfigError

FULL = """
run = "all"
seed = 3
variants = [{ name = "torus", set = { topology = { graph = "torus" } } }]
[topology]
graph = "ring"
agents = 4
options = { "odd key" = 1 }
mixing = { name = "metropolis", options = { lazy = 0.5 } }
[task]
name = "digits"
options = { model = "mlp" }
models = [{ agents = ["agent-0"], options = { model = "cnn" } }]
[train]
steps_per_round = 4
optimizer = { name = "sgd", lr = 0.5, momentum = 0.0 }
[merge]
method = "distil"
[schedule]
rounds = 3
target = 0.9
[simulate]
faults = [{ kind = "crash", agent = "agent-1", round = 2, on = "train", restart_after_s = 1 }]
network = { latency_s = [0.1, 0.2] }
[agent]
name = 'quo"ted \\ name'
[monitor]
wandb = { project = "p" }
tensorboard = "here"
"""


def test_every_key_has_a_type_and_a_meaning_and_is_one() -> None:
    """Reference: pydantic's own fields, walked here by name; a key of each table that people set most."""
    keys = all_keys()
    assert len({key.path for key in keys}) == len(keys) > 150
    assert [key.path for key in keys if not key.meaning or not key.type] == []
    assert {key.path.partition(".")[0].removesuffix("[]") for key in keys} == {*ExperimentConfig.model_fields} - {
        "folder"
    }
    by_path = {key.path: key for key in keys}
    assert by_path["train.optimizer.lr"].default == "0.002"
    assert by_path["schedule.mode"].type == '"sync" | "async"'
    assert by_path["schedule.changes[].topology"].type == "table, as topology"
    assert by_path["train.steps_per_round"].meaning == "Optimizer steps per round, instead of epochs."


def test_keys_are_found_by_a_part_and_by_a_pattern() -> None:
    assert [key.path for key in all_keys("deadline")] == ["schedule.round_deadline_s"]
    assert {key.path for key in all_keys("train.*lr*")} >= {"train.optimizer.lr", "train.lr_schedule.gamma"}
    assert nearest_paths("lr") == ["train.optimizer.lr", "merge.outer.lr"]
    assert nearest_paths("x" * 10**6) == []


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ("lr=0.1", "unknown key 'lr' in --set lr; did you mean 'train.optimizer.lr' or 'merge.outer.lr'?"),
        ("train.lr=0.1", "unknown key 'train.lr' in --set train.lr; did you mean 'train.optimizer.lr' or"),
        ("deadline=3", "did you mean 'schedule.round_deadline_s'?"),
        ("train.batchsize=3", "unknown key 'train.batchsize' in --set train.batchsize; did you mean 'batch_size'?"),
    ],
)
def test_an_unknown_key_names_the_nearest_of_all_tables(item: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(None, (item,))
    assert told in str(caught.value)


@pytest.mark.parametrize("text", [FULL, "", '[task]\nhook = "own.py:task"\n[monitor]\nmlflow = true\n'])
def test_what_is_shown_is_the_experiment(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Reference: the lines of `config show`, read as TOML, are the same experiment."""
    file = tmp_path / "experiment.toml"
    file.write_text(text)
    assert main(["config", "show", str(file)]) == 0
    again = tmp_path / "again.toml"
    again.write_text(capsys.readouterr().out)
    assert load_experiment(again) == load_experiment(file)


def test_each_value_says_where_it_came_from(tmp_path: Path) -> None:
    """The last source wins: default, file, variable, --set; of keys that exclude each other, too."""
    file = tmp_path / "experiment.toml"
    file.write_text('[task]\nname = "digits"\n[train]\nepochs_per_round = 2\noptimizer = "sgd"\nbatch_size = 8\n')
    env = {"DIMAT_TRAIN__BATCH_SIZE": "9", "DIMAT_SCHEDULE__ROUNDS": "4"}
    changes = ("task.hook=own.py:task", "train.steps_per_round=5", "schedule.rounds=6", "train.optimizer.lr=0.5")
    config, origins = load_with_origins(file, changes, env)
    found = {each.path: (each.value, each.source) for each in settings_of(config, file.name, read_toml(file), origins)}
    assert found["task.hook"] == ('"own.py:task"', "--set task.hook")
    assert found["train.steps_per_round"] == ("5", "--set train.steps_per_round")
    assert found["train.batch_size"] == ("9", "DIMAT_TRAIN__BATCH_SIZE")
    assert found["schedule.rounds"] == ("6", "--set schedule.rounds")
    assert found["train.optimizer.name"] == ('"sgd"', "experiment.toml")
    assert found["train.optimizer.lr"] == ("0.5", "--set train.optimizer.lr")
    assert found["train.optimizer.momentum"] == ("0.9", "default")
    assert not {"task.name", "train.epochs_per_round"} & found.keys()
    changes = ("train={ batch_size = 10 }", "task.name=digits")
    _, origins = load_with_origins(file, changes, {**env, "DIMAT_TASK__HOOK": "a.py:b"})
    here = {"train": "--set train", "task.name": "--set task.name"}
    assert origins == here | {"schedule.rounds": "DIMAT_SCHEDULE__ROUNDS"}


def test_a_file_that_gives_both_is_still_refused(tmp_path: Path) -> None:
    file = tmp_path / "experiment.toml"
    file.write_text('[task]\nname = "digits"\nhook = "own.py:task"\n')
    with pytest.raises(ConfigError, match="task: give name or hook, not both"):
        load_experiment(file)


@pytest.mark.parametrize("value", ["true", "false"])
@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_trackers_are_switched_by_one_word(tracker: str, value: str) -> None:
    """As `tensorboard` is: true is the table with its defaults."""
    on = getattr(load_experiment(None, (f"monitor.{tracker}={value}",)).monitor, tracker)
    assert on == (
        getattr(load_experiment(None, (f"monitor.{tracker}={{}}",)).monitor, tracker) if value == "true" else None
    )


def test_a_tracker_that_is_on_can_be_set_below() -> None:
    config = load_experiment(None, ("monitor.wandb=true", "monitor.wandb.project=mine"))
    assert config.monitor.wandb is not None
    assert config.monitor.wandb.project == "mine"


@pytest.mark.parametrize(
    ("change", "told"),
    [("{ trian = { x = 1 } }", "unknown key 'trian'"), ("{ merge = { combine = 'nonsense' } }", "'nonsense'")],
)
def test_variants_are_checked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, told: str) -> None:
    file = tmp_path / "experiment.toml"
    file.write_text(f'variants = [{{ name = "odd", set = {change} }}]\n')
    assert main(["config", "check", str(file)]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert "variant 'odd'" in err


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "experiment.toml"
    file.write_text(FULL)
    plain = tmp_path / "plain.toml"
    plain.write_text("seed = 1\n")
    assert main(["config", "check", str(file)]) == 0
    assert "keys and values are right (run all, method distil)" in capsys.readouterr().out
    assert main(["config", "keys", "round_deadline", "--json"]) == 0
    (key,) = json.loads(capsys.readouterr().out)
    assert (key["path"], key["default"], key["type"]) == ("schedule.round_deadline_s", "600.0", "number")
    assert main(["config", "show", str(file), "--set", "seed=9", "--json"]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert shown["seed"] == {"value": "9", "from": "--set seed"}
    for words, told in (
        (["keys", "lrr"], "no key is called 'lrr'; did you mean 'train.optimizer.lr' or 'merge.outer.lr'?"),
        (["check", str(plain), "--set", "merge.repair=batch"], "did you mean 'batchnorm'?"),
        (["show", str(tmp_path / "none.toml")], "cannot read"),
    ):
        assert main(["config", *words]) == 2
        assert told in capsys.readouterr().err
