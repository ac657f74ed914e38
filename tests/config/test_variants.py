"""Variants of an experiment: what they change, how `--compare` finds them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dimat.config import ExperimentConfig, build, changed
from dimat.errors import ConfigError
from dimat.simulate.compare import cases_of
from dimat.simulate.folder import describe

VARIANTS = [
    {"name": "torus", "group": "in-step", "set": {"topology": {"graph": "torus"}}},
    {"name": "late", "set": {"schedule": {"mode": "async"}, "train": {"optimizer": {"name": "sgd", "lr": 0.1}}}},
]


def experiment(**tables: Any) -> ExperimentConfig:
    return build(ExperimentConfig, {"topology": {"agents": 4}, "variants": VARIANTS, **tables}, "x.toml")


def cases(config: ExperimentConfig, *names: str) -> list[Any]:
    return cases_of(config, names, {"iid": config.task.partition}, (0, 1), Path("out"))


def test_changes_go_into_tables_and_new_names_bring_their_own_options() -> None:
    """By hand."""
    tree = {"a": {"b": 1, "c": 2}, "mixing": {"name": "uniform", "options": {"lazy": 0.5}}, "x": "y"}
    assert changed(tree, {"a": {"c": 3}, "x": {"name": "z"}}) == {**tree, "a": {"b": 1, "c": 3}, "x": {"name": "z"}}
    assert changed(tree, {"mixing": {"name": "metropolis"}})["mixing"] == {"name": "metropolis"}
    assert changed(tree, {"mixing": {"options": {"lazy": 0.1}}})["mixing"]["name"] == "uniform"
    assert tree["a"] == {"b": 1, "c": 2}


def test_a_change_takes_the_place_of_what_it_excludes() -> None:
    """`topology.python` over `graph`, steps over epochs, a hook over a task's name; in other tables names are names."""
    tree = {"task": {"name": "digits", "options": {}}, "topology": {"graph": "ring"}, "train": {"epochs_per_round": 2}}
    changes = {"task": {"hook": "a.py:b"}, "topology": {"python": "a.py:c"}, "train": {"steps_per_round": 4}}
    made = changed({**tree, "x": {"name": "y"}}, {**changes, "x": {"hook": "z"}})
    assert made == {**changes, "task": {"hook": "a.py:b", "options": {}}, "x": {"name": "y", "hook": "z"}}


def test_variants_and_methods_side_by_side() -> None:
    """Each is the experiment with its changes; groups are headings; the ceiling goes under the first one, once."""
    config = experiment(folder="somewhere")
    made = cases(config, "all", "average", "centralised")
    found = [(case.split, case.method, case.seed) for case in made]
    assert found == [
        (split, name, seed)
        for split, name in (("in-step", "torus"), ("iid", "late"), ("iid", "average"), ("in-step", "centralised"))
        for seed in (0, 1)
    ]
    torus, late = made[0].config, made[2].config
    assert (torus.topology.graph, torus.topology.agents, torus.schedule.mode) == ("torus", 4, "sync")
    assert (late.topology.graph, late.schedule.mode, late.train.optimizer.name) == (None, "async", "sgd")
    assert {case.config.folder for case in made} == {"somewhere"}
    assert {case.config.variants for case in made} == {()}
    assert made[4].config.merge.method == "average"
    assert made[1].folder == Path("out/in-step/torus/seed1")


def test_a_run_does_not_depend_on_the_variants_beside_it() -> None:
    """A run folder is that of the same experiment after a variant was added."""
    assert describe(experiment()) == describe(experiment(variants=[]))


@pytest.mark.parametrize(
    ("variants", "names", "said"),
    [
        ([], ["tours"], "unknown method or variant 'tours'"),
        (VARIANTS, ["tours"], "did you mean 'torus'?"),
        ([{"name": "dimat"}], ["dimat"], "a variant is named 'dimat', which has another meaning for --compare"),
        ([{"name": "all"}], ["all"], "a variant is named 'all'"),
        ([{"name": "x", "set": {"topology": {"grahp": "ring"}}}], ["x"], "unknown key 'topology.grahp' in the compar"),
        ([{"name": "x", "set": {"topology": {"edges": [["a", "b"]], "graph": "ring"}}}], ["x"], "give one of map"),
    ],
)
def test_bad_variants(variants: list[Any], names: list[str], said: str) -> None:
    """One line that names the variant or what is wrong with it."""
    with pytest.raises(ConfigError) as error:
        cases(experiment(variants=variants), *names)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_names_that_cannot_be_folders_or_come_twice_are_refused() -> None:
    """At the time the file is read."""
    for bad in ("", "../x", "a b", "x" * 41):
        with pytest.raises(ConfigError, match=r"x\.toml: variants\[0\]\.name: "):
            experiment(variants=[{"name": bad}])
    with pytest.raises(ConfigError, match=r"variants\[1\] and variants\[0\] are both named 'a'; rename one"):
        experiment(variants=[{"name": "a"}, {"name": "a"}])
