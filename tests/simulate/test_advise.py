"""`dimat advise`. References: the simulator's own runs of the same configurations; a task on which merging must lose or
win by how it is made; the experiment that the advised TOML makes."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from dimat.advice import Advice
from dimat.cli import main
from dimat.config import ExperimentConfig, build, changed
from dimat.errors import ConfigError
from dimat.simulate import run_simulation
from dimat.simulate.advise import CONDITIONS, advise
from dimat.simulate.factors import FACTORS, with_settings
from tests.simulate.helpers import tiny_experiment

SKEWED = {"hook": "tiny_task.py:task", "partition": {"kind": "classes", "classes_per_agent": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("advise")


@pytest.fixture(scope="module")
def experiment(folder: Path) -> ExperimentConfig:
    """Four agents on a path with two of four classes each, and starts of their own."""
    changes = {"topology": {"graph": "path", "agents": 4}, "schedule": {"rounds": 12}, "task": SKEWED}
    return tiny_experiment(folder, **changes, train__loss="task")


@pytest.fixture(scope="module")
def advice(experiment: ExperimentConfig, folder: Path) -> Advice:
    return advise(experiment, rounds=2, workers=1, out=folder / "probes")


def test_each_factor_begins_where_the_last_one_ended(advice: Advice) -> None:
    """One row of each factor is kept; it is the row of no gain in the next factor, and the last one is advised."""
    factors = list(dict.fromkeys(row.factor for row in advice.rows))
    assert factors == list(FACTORS)
    before = advice.given.values
    for factor in factors:
        rows = [row for row in advice.rows if row.factor == factor]
        (kept,) = [row for row in rows if row.kept]
        assert before in [row.values for row in rows if row.gain == 0]
        for row in rows:
            assert row.gain == pytest.approx(row.mean - sum(before) / len(before))
            assert row.mean - kept.mean <= row.noise  # nothing that was clearly better was passed over
        before = kept.values
    assert before == advice.advised.values


def test_rows_are_runs_of_the_simulator(advice: Advice, experiment: ExperimentConfig, tmp_path: Path) -> None:
    """The experiment as it is, shortened by hand, has the metric of its row, seed by seed; as many epochs for all."""
    epochs = experiment.train.epochs_per_round
    assert f"2 rounds of {epochs:g} epochs, 17 % of the experiment's 24" in advice.probe
    short = with_settings(experiment, {"schedule.rounds": 2}, "the test")
    for seed, value in enumerate(advice.given.values):
        results = run_simulation(with_settings(short, {"seed": seed}, "the test"))
        assert results.after_merge()[-1] == value
    own = ("train.loss", "train.initialisation")
    changes = {k: v for k, v in advice.settings.items() if k in own} | {"merge.method": "isolated"}
    changes |= {"train.epochs_per_round": 4.0, "schedule.rounds": 1}  # how rounds are cut makes no difference to it
    assert run_simulation(with_settings(short, changes, "the test")).after_merge()[-1] == advice.alone.values[0]
    assert advice.alone.mb == 0 < advice.given.mb


def test_the_lines_to_paste_make_what_was_advised(advice: Advice, experiment: ExperimentConfig) -> None:
    """TOML put into the experiment gives a valid one, with the settings that are told."""
    assert advice.settings
    tree = experiment.model_dump(exclude_unset=True)
    for key in advice.removed:
        table, _, name = key.rpartition(".")
        tree[table].pop(name, None)
    made = build(ExperimentConfig, changed(tree, tomllib.loads(advice.toml())) | {"folder": "."}, "the advice")
    for key, value in advice.settings.items():
        table, _, name = key.rpartition(".")
        found = getattr(getattr(made, table), name)
        assert getattr(found, "name", found) == value
    whole = experiment.schedule.rounds * (experiment.train.epochs_per_round or 0)
    assert made.schedule.rounds * (made.train.epochs_per_round or 0) == pytest.approx(whole)


def test_equal_seeds_give_equal_tables(
    advice: Advice, experiment: ExperimentConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command, a second time: all rows and settings are the same bits."""
    file = Path(experiment.folder) / "experiment.json"
    plain = experiment.model_dump(exclude_unset=True)
    file = file.with_suffix(".toml")
    tables = {key: value for key, value in plain.items() if isinstance(value, dict)}
    lines = [f"run = {json.dumps(plain['run'])}"]
    lines += [f"{key} = {_inline(value)}" for key, value in tables.items()]
    file.write_text("\n".join(lines) + "\n")
    words = ["advise", str(file), "--rounds", "2", "--json", "--quiet", "--workers", "1", "--out", str(tmp_path / "o")]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    once = json.loads(json.dumps(advice.to_plain()))
    same = ("rows", "settings", "toml", "given", "advised", "alone", "by", "probe", "notes")
    assert {key: found[key] for key in same} == {key: once[key] for key in same}
    assert json.loads((tmp_path / "o" / "advice.json").read_text()) == found


def _inline(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_inline(each)}" for key, each in value.items() if each is not None) + " }"
    return json.dumps(value)


def test_it_says_what_short_probes_cannot(advice: Advice, experiment: ExperimentConfig) -> None:
    """And what they left out of the experiment."""
    assert "short probes favour options that learn fast" in advice.notes[-1]
    told = {key for key, note in CONDITIONS.items() if note in advice.notes}
    assert told == CONDITIONS.keys() & advice.settings.keys()
    assert told  # of this experiment some are advised
    first = with_settings(experiment, {"train.first_round_epochs": 3.0}, "the test")
    notes = advise(first, rounds=1, seeds=1, workers=1).notes
    assert notes[0] == "probes leave out the experiment's train.first_round_epochs"


@pytest.mark.parametrize("method", ["isolated", "dpsgd"])
def test_what_it_is_not_for(folder: Path, method: str) -> None:
    """Methods that never merge, and those that merge after every step, have no rounds to advise on."""
    with pytest.raises(ConfigError, match=f'"{method}" .*; set merge.method = "dimat"'):
        advise(tiny_experiment(folder, merge={"method": method}))


def test_bad_input_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2."""
    assert main(["advise", str(tmp_path / "none.toml")]) == 2
    assert "no experiment file" in capsys.readouterr().err
    (tmp_path / "experiment.toml").write_text("")
    assert main(["advise", str(tmp_path / "experiment.toml"), "--budget", "0"]) == 2
    assert capsys.readouterr().err.startswith("dimat: ")
