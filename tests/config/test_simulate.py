"""Settings of the simulator: ranges, links, and which fields a fault of each kind takes."""

from __future__ import annotations

from typing import Any

import pytest

from dimat.config import SimulateConfig, build
from dimat.errors import ConfigError


def settings(**tables: Any) -> SimulateConfig:
    return build(SimulateConfig, tables, "x.toml")


def test_defaults_change_nothing() -> None:
    """Reference: the brief: without settings a network is instantaneous, lossless and without faults."""
    made = settings()
    assert (made.network.latency_s, made.network.loss) == (0, 0)
    assert (made.network.bandwidth_mbit_s, made.network.uplink_mbit_s) == (None, None)
    assert (made.compute.round_s, made.compute.step_s, made.compute.merge_s, made.compute.speed) == (1, None, 0, 1)
    assert made.faults == ()
    assert (made.random_faults.crashes_per_hour, made.random_faults.partitions_per_hour) == (0, 0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("latency_s", 0),
        ("latency_s", [0, 0.5]),
        ("latency_s", [0.5, 0.5]),
        ("bandwidth_mbit_s", 100),
        ("bandwidth_mbit_s", [1, 1000]),
        ("uplink_mbit_s", (0.5, 2.0)),
    ],
)
def test_a_number_or_a_range(key: str, value: Any) -> None:
    """Law: what is given comes back, a list as a pair."""
    given = getattr(settings(network={key: value}).network, key)
    assert given == (tuple(value) if isinstance(value, list | tuple) else value)


@pytest.mark.parametrize(
    ("table", "key", "value", "said"),
    [
        ("network", "latency_s", -1, "must be 0 or more"),
        ("network", "latency_s", [0.2, 0.1], "the range [0.2, 0.1] is reversed; write [low, high]"),
        ("network", "latency_s", [0.1], "must be a number or a range [low, high]"),
        ("network", "latency_s", "slow", "must be a number or a range [low, high] (got 'slow')"),
        ("network", "latency_s", True, "must not be true or false"),
        ("network", "latency_s", float("inf"), "finite"),
        ("network", "latency_s", float("nan"), "finite"),
        ("network", "bandwidth_mbit_s", 0, "must be above 0"),
        ("network", "bandwidth_mbit_s", [0, 1], "must be above 0"),
        ("network", "loss", 1, "less than 1"),
        ("network", "attempts", 0, "greater than or equal to 1"),
        ("compute", "speed", [0, 2], "must be above 0"),
        ("compute", "round_s", 0, "greater than 0"),
        ("random_faults", "mean_down_s", 0, "greater than 0"),
    ],
)
def test_numbers_that_cannot_be(table: str, key: str, value: Any, said: str) -> None:
    """Reference: the units in the docstrings; the message names the key as it is written."""
    with pytest.raises(ConfigError) as error:
        settings(**{table: {key: value}})
    assert str(error.value).startswith(f"x.toml: {table}.{key}: ")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("links", "said"),
    [
        ([{"between": ["a", "b"]}, {"between": ["b", "a"]}], "links[1] and links[0] both connect 'b' and 'a'"),
        ([{"between": ["a", "a"]}], "network.links[0]: a link connects two agents, not 'a' with itself"),
        ([{"between": ["a"]}], "network.links[0].between[1]"),
        ([{"between": ["a", "b"], "los": 1}], "unknown key 'network.links[0].los' in x.toml; did you mean 'loss'?"),
    ],
)
def test_links_that_cannot_be(links: list[dict[str, Any]], said: str) -> None:
    """Each link once, between two agents."""
    with pytest.raises(ConfigError) as error:
        settings(network={"links": links})
    assert said in str(error.value)


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "crash", "agent": "a", "at_s": 0},
        {"kind": "crash", "agent": "a", "at_s": 5, "restart_after_s": 0},
        {"kind": "crash", "agent": "a", "round": 1, "on": "trained", "restart_after_s": 3},
        {"kind": "join", "agent": "a", "at_s": 5},
        {"kind": "leave", "agent": "a", "at_s": 5},
        {"kind": "partition", "at_s": 5, "groups": [["a"]]},
        {"kind": "partition", "at_s": 5, "groups": [["a"], ["b"]], "heal_after_s": 2},
        {"kind": "slow", "agent": "a", "at_s": 5, "factor": 3},
    ],
)
def test_faults_of_every_kind(entry: dict[str, Any]) -> None:
    """Law: what is written is what is set, and nothing else is."""
    (made,) = settings(faults=[entry]).faults
    assert {key for key, value in made if value not in (None, ())} == set(entry)


CRASH = {"kind": "crash", "agent": "a"}
AT = {"agent": "a", "at_s": 5}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"kind": "crash", "at_s": 5}, ': a "crash" needs agent; add it'),
        (CRASH, ': a "crash" needs at_s, or round and on; add it'),
        ({**CRASH, "at_s": 5, "round": 2, "on": "merge"}, ": a crash has at_s, or round and on, not both; remove one"),
        ({**CRASH, "round": 2}, ": round and on belong together; add on"),
        ({**CRASH, "on": "merge"}, ": round and on belong together; add round"),
        ({**CRASH, "round": 2, "on": "merging"}, ".on: Input should be 'train', 'trained', "),
        ({**CRASH, "at_s": 5, "heal_after_s": 5}, ': a "crash" takes no heal_after_s (only "partition"); remove it'),
        ({**CRASH, "at_s": -1}, ".at_s: "),
        ({"kind": "leave", **AT, "restart_after_s": 3}, ': a "leave" takes no restart_after_s (only "crash")'),
        ({"kind": "join", "agent": "a"}, ': a "join" needs at_s; add it'),
        ({"kind": "join", **AT, "round": 2}, ': a "join" takes no round (only "crash"); remove it'),
        ({"kind": "partition", "at_s": 5}, ': a "partition" needs groups; add it'),
        ({"kind": "partition", "groups": [["a"]]}, ': a "partition" needs at_s; add it'),
        (
            {"kind": "partition", **AT, "groups": [["a"]]},
            ': a "partition" takes no agent (only "crash", "join", "leave", "slow"); remove it',
        ),
        ({"kind": "slow", **AT}, ': a "slow" needs factor; add it'),
        ({"kind": "slow", **AT, "factor": 0}, ".factor: "),
        ({"kind": "slow", **AT, "factor": 2, "groups": [["a"]]}, ': a "slow" takes no groups (only "partition")'),
        ({"kind": "flood", **AT}, ".kind: Input should be 'crash', 'join', 'leave', 'partition' or 'slow'"),
    ],
)
def test_fields_that_a_kind_lacks_or_does_not_take(entry: dict[str, Any], said: str) -> None:
    """Reference: the kinds in the docstring of FaultConfig; the message names the entry."""
    with pytest.raises(ConfigError) as error:
        settings(faults=[{"kind": "leave", "agent": "b", "at_s": 1}, entry])
    assert str(error.value).startswith(f"x.toml: faults[1]{said}")


def test_random_faults_need_an_end() -> None:
    """Otherwise a run that waits for an agent would draw for ever."""
    for key in ("crashes_per_hour", "partitions_per_hour"):
        with pytest.raises(ConfigError, match=f"^x.toml: random_faults: {key} needs until_s"):
            settings(random_faults={key: 2})
        assert settings(random_faults={key: 2, "until_s": 60}).random_faults.until_s == 60
