"""What must be refused, and is: a truth in the place of a number, and names that lead nowhere or outside.

Reference: the annotations of the settings and options, exit code 2 of `dimat/errors.py`, and the folder before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel
from safetensors.torch import save_file

from dimat.config import ExperimentConfig
from dimat.errors import ConfigError
from dimat.merge.outer import outer_registry
from dimat.merge.registry import accept_registry, align_registry, combine_registry, repair_registry
from dimat.merge.shared_logits import logits_registry
from dimat.registry import Registry, _options  # pyright: ignore[reportPrivateUsage]
from dimat.tasks.registry import TASKS
from dimat.topology.graphs import GRAPHS
from dimat.topology.mixing import MIXINGS
from dimat.topology.schedule import SCHEDULES
from dimat.train.losses import LOSSES
from tests.cli.bad_input import Place, as_toml
from tests.cli.test_bad_values import EXPERIMENT, MAP, MERGEKIT, RECIPE
from tests.merge_files.models import weights
from tests.simulate.helpers import TINY_TASK

Path_ = tuple[str | int, ...]
NEEDED: Mapping[Path_, dict[str, Any]] = {
    ("schedule", "changes", 0): {"round": 2, "topology": {}},
    ("simulate", "network", "links", 0): {"between": ["a", "b"]},
    ("simulate", "faults", 0): {"kind": "crash", "agent": "a"},
}
"""What entries of lists need beside the setting in question."""


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, capsys, monkeypatch)


def is_number(annotation: Any) -> bool:
    """Tell whether a value may be a number, alone or inside of a list or table, and may not be a truth."""
    kinds = set(_kinds(annotation))
    return bool(kinds & {int, float}) and not kinds & {bool, Any}


def _kinds(annotation: Any) -> Iterator[Any]:
    inner = get_args(annotation)
    if not inner or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        yield annotation
    for each in inner:
        yield from _kinds(each)


def numbers(kind: type[BaseModel], before: Path_ = ()) -> Iterator[Path_]:
    """Yield the path of every number among the settings of a table, those of tables inside included."""
    for name, field in kind.model_fields.items():
        if is_number(field.annotation):
            yield (*before, name)
        for inner, listed in _tables(field.annotation):
            yield from numbers(inner, (*before, name, 0) if listed else (*before, name))


def _tables(annotation: Any, listed: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, listed
    for each in get_args(annotation):
        yield from _tables(each, listed or get_origin(annotation) in (tuple, list))


def nested(path: Path_, value: Any) -> Any:
    for depth in range(len(path) - 1, -1, -1):
        value = [value] if isinstance(path[depth], int) else {**NEEDED.get(path[:depth], {}), path[depth]: value}
    return value


def test_no_setting_takes_a_truth_for_a_number(place: Place) -> None:
    """Every setting whose annotation asks for a number, each given both truths: told by its name, before anything is
    made. The nearest that pydantic would read are 1 and 0."""
    paths = list(numbers(ExperimentConfig))
    assert len(paths) > 80
    assert {("schedule", "rounds"), ("simulate", "network", "links", 0, "loss"), ("seed",)} <= set(paths)
    for path in paths:
        for value in (True, False):
            (place.folder / "x.toml").write_text(as_toml(nested(path, value)))
            line = place.refuses(["simulate", "x.toml"], str(path), codes=(2,))
            shown = ".".join(map(str, path)).replace(".0", "[0]")
            assert f"x.toml: {shown}: must not be true or false" in line


def test_no_option_takes_a_truth_for_a_number() -> None:
    """Every option of every graph, schedule, mixing, loss, task and method whose annotation asks for a number."""
    merging = (align_registry, combine_registry, repair_registry, accept_registry, outer_registry, logits_registry)
    tried = 0
    registries: tuple[Registry[Any], ...] = (GRAPHS, SCHEDULES, MIXINGS, LOSSES, TASKS, *merging)
    for registry in registries:
        for name in registry.names():
            for key, option in _options(registry.get(name), registry.context).items():
                kind = option.annotation
                if isinstance(kind, str):
                    kind = eval(kind, option.owner.__globals__)
                if is_number(kind):
                    tried += 1
                    for value in (True, False):
                        with pytest.raises(ConfigError, match=rf"option '{key}'.*got {value}"):
                            registry.check(name, {key: value})
    assert tried > 140


def truths(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield a tree with each of its numbers replaced by a truth, one at a time, and the number's place."""

    def places(value: Any, before: Path_) -> Iterator[Path_]:
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield before
        listed = enumerate(value) if isinstance(value, list) else ()
        for key, inner in value.items() if isinstance(value, dict) else listed:
            yield from places(inner, (*before, key))

    for where in places(tree, ()):
        for value in (True, False):
            changed = deepcopy(tree)
            holder = changed
            for key in where[:-1]:
                holder = holder[key]
            holder[where[-1]] = value
            yield f"{where} = {value}", changed


def _write_toml(tree: Any) -> None:
    Path("x.toml").write_text(as_toml(tree))


def _write_yaml(tree: Any) -> None:
    Path("x.yaml").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("tree", "write", "command"),
    [
        (EXPERIMENT, _write_toml, ["simulate", "x.toml"]),
        (MAP, _write_toml, ["topology", "show", "x.toml"]),
        (RECIPE, _write_toml, ["merge", "x.toml"]),
        (MERGEKIT, _write_yaml, ["merge", "--from-mergekit", "x.yaml", "-o", "out"]),
    ],
    ids=["experiment", "map", "recipe", "mergekit"],
)
def test_no_file_takes_a_truth_for_a_number(
    tree: Any, write: Callable[[Any], None], command: list[str], place: Place
) -> None:
    """Every number of a whole file, options and tables of free keys included."""
    (place.folder / "tiny_task.py").write_text(TINY_TASK)
    for name, seed in (("a", 0), ("b", 1), ("base", 2)):
        save_file(weights(seed), place.folder / f"{name}.safetensors")
    for what, changed in truths(tree):
        write(changed)
        place.refuses(command, what, codes=(2,))


NAMES = ["", " ", ".", "..", "../x", "a/../..", "a/b", "a\\b", "a\0b", "\n", "\x7f", "x" * 300]
"""What can name no folder of its own, or one elsewhere."""


@pytest.fixture
def agents(place: Place) -> Place:
    """A network of two agents without keys, of whom lab-a could run its one round alone."""
    (place.folder / "tiny_task.py").write_text(TINY_TASK)
    (place.folder / "map.toml").write_text(as_toml(mapped("lab-a")))
    return place


def mapped(name: str) -> dict[str, Any]:
    agents = [{"name": n, "addresses": [f"127.0.0.1:{port}"]} for n, port in ((name, 7397), ("lab-b", 7396))]
    return {"graph": "path", "agents": agents}


def experiment(**agent: Any) -> str:
    own = {"name": "lab-a", "insecure": True, "founder": True, "linger_s": 0.0, **agent}
    schedule = {"rounds": 1, "round_deadline_s": 1.0}
    tree = {"topology": {"map": "map.toml"}, "task": {"hook": "tiny_task.py:task"}, "merge": {"method": "average"}}
    return as_toml({**tree, "schedule": schedule, "agent": own})


@pytest.mark.parametrize("name", NAMES)
def test_names_of_runs_and_agents(name: str, agents: Place) -> None:
    """Of a run, simulated or real; of an agent, in its file, by --name, on the map, and in keys: exit code 2."""
    file, card = agents.folder / "x.toml", agents.folder / "map.toml"
    file.write_text(as_toml({"run": name, "task": {"hook": "tiny_task.py:task"}, "topology": {"agents": 2}}))
    agents.refuses(["simulate", "x.toml", "--quiet"], codes=(2,))
    file.write_text(as_toml({"run": name}) + experiment())
    for command in ("agent", "status"):
        agents.refuses([command, "x.toml"], codes=(2,))
    file.write_text(experiment(name=name))
    agents.refuses(["agent", "x.toml"], codes=(2,))
    if len(name) < 255:  # of a longer one, there is just no such agent
        agents.refuses(["status", "x.toml"], codes=(2,))
    card.write_text(as_toml(mapped(name)))
    agents.refuses(["agent", "x.toml"], codes=(2,))
    agents.refuses(["keys", "issue", "--map", "map.toml"], codes=(2,))
    card.write_text(as_toml(mapped("lab-a")))
    file.write_text(experiment())
    agents.refuses(["agent", "x.toml", "--name", name], codes=(2,))
    agents.refuses(["keys", "request", name], codes=(2,))
    agents.refuses(["keys", "issue", name], codes=(2,))


@pytest.mark.parametrize("name", ["", "  ", "a\0b", "\n", "..", "a/../..", "./.."])
def test_folders_of_agents(name: str, agents: Place) -> None:
    """An agent's folder is one of its own, and no folder of keys is empty: exit code 2."""
    keys = ["agent.folder"] if ".." in name else ["agent.folder", "agent.keys"]
    for key in keys:
        (agents.folder / "x.toml").write_text(experiment(**{key.partition(".")[2]: name}))
        line = agents.refuses(["agent", "x.toml"], codes=(2,))
        assert key in line
        (agents.folder / "x.toml").write_text(experiment())
        agents.refuses(["agent", "x.toml", "--set", f"{key}={json.dumps(name)}"], codes=(2,))


@pytest.mark.parametrize("command", [["keys", "init-ca", "--folder"], ["simulate", "x.toml", "--out"], ["report"]])
@pytest.mark.parametrize("name", ["", "a\0b"])
def test_folders_of_commands(command: list[str], name: str, agents: Place) -> None:
    """An empty argument, as of a shell's variable that is not set, is not this folder: exit code 2."""
    (agents.folder / "x.toml").write_text(as_toml({"task": {"hook": "tiny_task.py:task"}, "topology": {"agents": 2}}))
    line = agents.refuses([*command, name], codes=(2,))
    assert f"(after {command[-1]!r})" in line


@pytest.mark.parametrize("name", ["..", "a/../..", "a/.."])
def test_a_run_does_not_mix_with_other_files(name: str, agents: Place) -> None:
    """A folder above is no run's, also where the way there leads through a folder that is not there: exit code 5."""
    (agents.folder / "x.toml").write_text(as_toml({"task": {"hook": "tiny_task.py:task"}, "topology": {"agents": 2}}))
    line = agents.refuses(["simulate", "x.toml", "--quiet", "--out", name], codes=(5,))
    assert f"folder {name} is not empty and is no run folder of dimat" in line
