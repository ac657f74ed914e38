"""The next thing to try, and how far class shares lie apart. Reference: distances by hand; the settings that are tried
out on the configurations that lack them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dimat.agent.setup import next_step as module
from dimat.agent.setup.class_shares import FAR_APART, class_distance
from dimat.agent.setup.next_step import ADVISE, averages_exactly, exact_average, next_step
from dimat.config import ExperimentConfig, build
from dimat.topology import build_topology
from dimat.topology.base_k import base_k_rounds
from dimat.train import losses

EQUAL = {"a": [5, 5], "b": [5, 5]}
APART = {"a": [10, 0], "b": [1, 9]}


def test_distance_by_hand() -> None:
    """Whole: 11/20, 9/20; a is 9/20 from it, b 9/20. Three agents: whole 1/2, 1/2, distances 1/2, 1/2, 0."""
    assert class_distance(APART) == pytest.approx(9 / 20)
    assert class_distance({"a": [4, 0], "b": [0, 4], "c": [3, 3]}) == pytest.approx(1 / 3)
    assert class_distance(EQUAL) == 0
    assert class_distance({"a": [4], "b": [0, 4]}) == pytest.approx(0.5)  # a class that comes later is not held


def test_distances_that_tell_nothing() -> None:
    """One agent, no classes, nobody with samples."""
    assert class_distance({}) is None
    assert class_distance({"a": [3, 4], "b": [0, 0]}) is None
    assert class_distance({"a": [30], "b": [40]}) is None


def test_one_threshold_for_the_loss() -> None:
    """That of "auto" itself."""
    assert module.SKEWED == losses.SKEWED < FAR_APART


def experiment(**tables: dict[str, Any]) -> ExperimentConfig:
    tree: dict[str, dict[str, Any]] = {"schedule": {"rounds": 20}, "topology": {"graph": "ring", "agents": 5}}
    return build(ExperimentConfig, {**tree, **{k: {**tree.get(k, {}), **v} for k, v in tables.items()}}, "the test")


FAR = {f"a{i}": [60 if i == j else 0 for j in range(5)] for i in range(5)}
OWN = {"initialisation": "own"}


@pytest.mark.parametrize(
    ("tables", "histogram", "sparse", "said"),
    [
        ({"train": OWN}, FAR, True, 'train.initialisation = "shared"'),
        ({"train": {"loss": "task"}}, FAR, True, 'train.loss = "auto"'),
        ({"train": {"loss": "task", "optimizer_state": "kept"}}, EQUAL, True, 'train.optimizer_state = "merged"'),
        ({}, FAR, True, "schedule.mixing_steps = 5 has one each round"),
        ({}, FAR, False, ADVISE),
        ({}, EQUAL, True, "schedule.mixing_steps = 3"),
        ({"schedule": {"rounds": 4, "mixing_steps": 3}}, EQUAL, True, "schedule.rounds = 12"),
        ({"topology": {"graph": "complete", "schedule": "base-k"}}, FAR, True, ADVISE),
        ({"train": OWN, "schedule": {"rounds": 20, "first_merge": "adopt-distil"}}, EQUAL, False, ADVISE),
        ({"merge": {"method": "average", "combine": "ties"}}, EQUAL, False, ADVISE),  # its moments cannot be averaged
        ({"merge": {"method": "isolated"}}, FAR, True, ""),
        ({"merge": {"method": "distil"}, "train": OWN}, FAR, True, ADVISE),  # nothing is averaged
        ({"merge": {"method": "distil"}, "schedule": {"rounds": 4}}, FAR, True, "schedule.rounds = 12"),
    ],
)
def test_what_is_tried_next(
    tables: dict[str, dict[str, Any]], histogram: dict[str, list[int]], sparse: bool, said: str
) -> None:
    """The likeliest of the settings that are not so yet."""
    config = experiment(**tables)
    found = next_step(config, histogram, sparse=sparse, exact=averages_exactly(build_topology(config.topology)))
    assert said in found
    assert bool(said) == bool(found)


@pytest.mark.parametrize("agents", [3, 5, 6])
def test_the_exact_average_is_one(agents: int) -> None:
    """The settings that are named, on the topology: the product of the rounds' mixing matrices is the mean of all."""
    steps = len(base_k_rounds(agents, 1))
    assert f"mixing_steps = {steps}" in exact_average(agents)
    config = experiment(topology={"graph": "complete", "agents": agents, "schedule": "base-k"})
    schedule = build_topology(config.topology).schedule
    product = np.eye(agents)
    for number in range(1, steps + 1):
        product = schedule.mixing(number) @ product
    assert np.allclose(product, 1 / agents)
