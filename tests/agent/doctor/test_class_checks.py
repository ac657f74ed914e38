"""What the doctor says of agents' class shares. Reference: the distance of the parts that the simulator gives the same
agents; the settings that it advises, after which it advises them no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dimat.agent.doctor.check import Check
from dimat.agent.doctor.class_checks import AUTO, check_classes
from dimat.agent.setup.class_shares import FAR_APART, class_distance
from dimat.agent.setup.prepare import prepare_agent
from dimat.simulate.world.scenario import prepare
from tests.simulate.helpers import tiny_experiment

ONE_CLASS = {"hook": "tiny_task.py:task", "partition": {"kind": "classes", "classes_per_agent": 1}}
EVEN = {"hook": "tiny_task.py:task", "partition": {"kind": "iid"}}
OWN = {"hook": "tiny_task.py:task"}
RING = {"graph": "ring", "agents": 4}
ALL = {"graph": "complete", "agents": 4}


def checks(folder: Path, **changes: Any) -> list[Check]:
    config = tiny_experiment(folder, **{"topology": RING, "agent": {"name": "agent-1"}, **changes})
    return list(check_classes(prepare_agent(config)))


def test_the_distance_is_that_of_the_parts_that_all_get(tmp_path: Path) -> None:
    """One class each: what is told is the distance of the simulator's own histogram, and it is far."""
    (found,) = checks(tmp_path, task=ONE_CLASS)
    histogram = prepare(tiny_experiment(tmp_path, topology=RING, task=ONE_CLASS)).histogram
    apart = class_distance(histogram)
    assert apart is not None
    assert apart > FAR_APART
    assert f"class shares are {apart:.2f} from the whole's" in found.what


@pytest.mark.parametrize(
    ("changes", "level", "exact", "auto"),
    [
        ({"task": ONE_CLASS, "train__loss": "task"}, "warn", True, True),
        ({"task": ONE_CLASS}, "warn", True, False),
        ({"task": ONE_CLASS, "train__loss": "task", "topology": ALL}, "warn", False, True),
        ({"task": ONE_CLASS, "topology": ALL}, "ok", False, False),
        ({"task": ONE_CLASS, "topology": {**ALL, "schedule": "base-k"}}, "ok", False, False),
        ({"task": EVEN, "train__loss": "task"}, "ok", False, False),
    ],
)
def test_what_is_advised(tmp_path: Path, changes: dict[str, Any], level: str, exact: bool, auto: bool) -> None:
    """Each of the two where the shares ask for it, and the configuration does not have it yet. No fault: code 0."""
    (found,) = checks(tmp_path, **changes)
    assert (found.name, found.level, found.code) == ("classes", level, 0)
    assert ('topology.schedule = "base-k"' in found.mend) == exact
    assert (AUTO in found.mend) == auto


def test_a_map_with_exact_averages_is_read(tmp_path: Path) -> None:
    """The map says who is linked, not the configuration."""
    names = "\n".join(f'[[agents]]\nname = "agent-{i}"\naddresses = ["127.0.0.1:{7300 + i}"]' for i in range(4))
    for graph, level in (("ring", "warn"), ("complete", "ok")):
        (tmp_path / "map.toml").write_text(f'graph = "{graph}"\n{names}\n')
        (found,) = checks(tmp_path, task=ONE_CLASS, topology={"map": "map.toml"})
        assert found.level == level


def test_of_data_of_its_own_an_agent_knows_its_own_counts_alone(tmp_path: Path) -> None:
    """Without a partition nothing is said of peers; the loss is advised by this agent's distance from equal shares."""
    (found,) = checks(tmp_path, task=OWN)
    assert found.level == "ok"
    assert "its peers' are not known here" in found.what
    (even,) = checks(tmp_path, task=OWN, train__loss="task")
    assert even.level == "ok"  # four classes, about as many points each
    text = (tmp_path / "tiny_task.py").read_text()
    (tmp_path / "few_task.py").write_text(text.replace("TensorData(x[a:b], y[a:b])", "TensorData(x[a:b], y[a:b] // 2)"))
    (found,) = checks(tmp_path, task={"hook": "few_task.py:task"}, train__loss="task")
    assert (found.level, found.mend) == ("warn", AUTO)


def test_nothing_is_said_of_one_agent(tmp_path: Path) -> None:
    """Nobody's shares differ from anybody's."""
    assert checks(tmp_path, topology={"graph": "ring", "agents": 2, "edges": None}, task=EVEN) != []
    config = {"edges": [], "agents": 1, "graph": None}
    assert checks(tmp_path, topology=config, agent={"name": "agent-0"}, task=EVEN) == []
