"""Simulated computers: training times against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dimat.config import ComputeConfig
from dimat.errors import ConfigError
from dimat.simulate.world.compute_model import Compute
from dimat.simulate.world.faults import Crash, Slow


def compute(faults: tuple[Any, ...] = (), seed: int = 0, **settings: Any) -> Compute:
    return Compute(ComputeConfig.model_validate(settings), ["a", "b", "c"], seed, faults)


def test_times_by_hand() -> None:
    """A round takes round_s, or step_s for each step, divided by the agent's speed; without learning nothing."""
    assert compute().train_s("a", 7, True, 0) == 1
    assert compute(round_s=6, speed=2, speeds={"b": 3}).train_s("a", 7, True, 5) == 3
    assert compute(round_s=6, speed=2, speeds={"b": 3}).train_s("b", 7, True, 5) == 2
    assert compute(step_s=0.5, round_s=9).train_s("a", 7, True, 0) == 3.5
    assert compute(round_s=6).train_s("a", 7, False, 0) == 0


def test_slow_by_hand() -> None:
    """Ten seconds of work, from 4 s on three times as slow, from 13 s on as at first: 4 + 3 (in 9 s) + 3 = 16 s."""
    slow = (Slow(4, "a", 3), Crash(5, "a"), Slow(6, "b", 9), Slow(13, "a", 1))
    made = compute(slow, round_s=10)
    assert made.train_s("a", 1, True, 0) == 16
    assert made.train_s("a", 1, True, 4) == 9 + 7
    assert made.train_s("a", 1, True, 20) == 10
    assert made.train_s("b", 1, True, 6) == 90
    assert made.train_s("c", 1, True, 0) == 10
    assert compute((Slow(4, "a", 3),), round_s=4).train_s("a", 1, True, 0) == 4


@given(
    st.lists(st.tuples(st.floats(0, 20), st.floats(0.1, 10)), max_size=5),
    st.floats(0, 20),
    st.integers(1, 50),
    st.integers(1, 50),
)
def test_work_adds_up(changes: list[tuple[float, float]], now: float, one: int, two: int) -> None:
    """Law: training in two parts, one right after the other, takes as long as in one, whatever slows it."""
    made = compute(tuple(Slow(at, "a", factor) for at, factor in sorted(changes)), step_s=0.25)
    first = made.train_s("a", one, True, now)
    both = first + made.train_s("a", two, True, now + first)
    assert both == pytest.approx(made.train_s("a", one + two, True, now), rel=1e-9)


def test_speeds_are_drawn_log_uniformly_per_agent() -> None:
    """Median √(low·high); four standard errors of 2,000 draws, fixed seed. Neither order nor others matter."""
    names = [f"agent-{i}" for i in range(2000)]
    config = ComputeConfig(speed=(0.25, 4), speeds={"agent-7": 100})
    made = Compute(config, names, 1)
    speeds = [made.speed(name) for name in names if name != "agent-7"]
    assert all(0.25 <= x <= 4 for x in speeds)
    assert sum(x < 1 for x in speeds) / len(speeds) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2000))
    assert made.speed("agent-7") == 100
    few = Compute(config, ["agent-7", "agent-9"], 1)
    assert few.speed("agent-9") == made.speed("agent-9") != Compute(config, names, 2).speed("agent-9")


def test_unknown_agent() -> None:
    """One line with the key and the nearest name."""
    with pytest.raises(ConfigError) as error:
        Compute(ComputeConfig(speeds={"lab-1": 2}), ["lab-12", "other"], 0)
    assert str(error.value) == "simulate.compute.speeds: no agent 'lab-1' in the topology; did you mean 'lab-12'?"
