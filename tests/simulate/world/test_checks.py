"""What is refused or warned of before a run: each message by hand, and the boundary beside it that passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dimat.config import NetworkConfig
from dimat.errors import ConfigError
from dimat.simulate.world.checks import travel_s
from dimat.simulate.world.scenario import prepare
from tests.simulate.helpers import tiny_experiment


def crash(agent: str, number: int, on: str, **more: Any) -> dict[str, Any]:
    return {"kind": "crash", "agent": agent, "round": number, "on": on, **more}


def warnings(folder: Path, **changes: Any) -> tuple[str, ...]:
    return prepare(tiny_experiment(folder, **changes)).warnings


LEAVE = {"kind": "leave", "agent": "agent-1", "at_s": 1.0}
JOIN = {"kind": "join", "agent": "agent-1", "at_s": 1.0}
GONE = {"kind": "crash", "agent": "agent-1", "at_s": 2.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"simulate__faults": [LEAVE, crash("agent-1", 3, "train")]},
            "simulate.faults[1]: agent 'agent-1' is to crash in round 3, but it leaves at 1 s, which is before anybody "
            "can be in that round; change the script",
        ),
        (
            {"simulate__faults": [crash("agent-1", 3, "train"), GONE]},
            "simulate.faults[0]: agent 'agent-1' is to crash in round 3, but it crashes for good at 2 s, which is "
            "before anybody can be in that round; change the script",
        ),
        (
            {"simulate__faults": [crash("agent-1", 4, "train")]},
            "simulate.faults[0]: agent 'agent-1' is to crash in round 4, but the last round is 3; "
            "choose an earlier one",
        ),
        (
            {"simulate__faults": [crash("agent-1", 1, "adopt")], "merge__method": "average"},
            "simulate.faults[0]: agent 'agent-1' never adopts anything in round 1: that is done by methods that align "
            'in a shared basis, with somebody to hear, and by an agent that joins late with schedule.join = "adopt"; '
            "choose another moment",
        ),
        (
            {"simulate__faults": [crash("agent-1", 1, "fetch")], "merge__method": "isolated"},
            "simulate.faults[0]: agent 'agent-1' hears nobody in round 1 and fetches nothing; choose another moment",
        ),
        (
            {"schedule__changes": [{"round": 4, "topology": {"graph": "ring", "agents": 3}}]},
            "schedule.changes[0]: holds from round 4 on, but the last one is 3; remove it, or give schedule.rounds "
            "more",
        ),
    ],
)
def test_what_can_never_come_about_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    """Reference: the docstring of `check_crash_points`; one line that names the entry, exit code 2."""
    with pytest.raises(ConfigError) as error:
        prepare(tiny_experiment(tmp_path, **changes))
    assert str(error.value) == said


@pytest.mark.parametrize(
    "changes",
    [
        {"simulate__faults": [{**LEAVE, "at_s": 2.1}, crash("agent-1", 3, "train")]},
        {"simulate__faults": [{**GONE, "restart_after_s": 1.0}, crash("agent-1", 3, "train")]},
        {"simulate__faults": [LEAVE, crash("agent-0", 3, "train")]},
        # an agent may pass over rounds: the fastest one counts
        {
            "simulate__faults": [{**LEAVE, "at_s": 2.1}, crash("agent-1", 3, "train")],
            "simulate__compute": {"speeds": {"agent-1": 0.1}},
        },
        {"simulate__faults": [crash("agent-1", 4, "train")], "schedule": {"rounds": 0, "max_time_s": 9.0}},
        {"simulate__faults": [crash("agent-1", 4, "merge")], "schedule": {"rounds": 3, "final_merge": True}},
        {"simulate__faults": [crash("agent-1", 1, "adopt")]},
        {"simulate__faults": [JOIN, crash("agent-1", 2, "adopt")], "merge__method": "average"},
        {"schedule__changes": [{"round": 3, "topology": {"graph": "ring", "agents": 3}}]},
    ],
)
def test_what_may_come_about_is_not_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Reference: the same docstring, on the other side of each boundary."""
    prepare(tiny_experiment(tmp_path, **changes))


def test_travel_by_hand() -> None:
    """An offer, a request and a transfer, 0.5 s each; 1 MB at 8 Mbit/s, the geometric middle of 2 to 32, takes 1 s
    more, and at an uplink of 1 Mbit/s 8 s."""
    assert travel_s(NetworkConfig(), 10**6) == 0
    slow = NetworkConfig(latency_s=(0.25, 0.75), bandwidth_mbit_s=(2, 32))
    assert travel_s(slow, 10**6) == pytest.approx(1.5 + 1)
    assert travel_s(slow.model_copy(update={"uplink_mbit_s": 1.0}), 10**6) == pytest.approx(1.5 + 8)


def test_a_deadline_that_leaves_no_time_for_travel_is_warned_of(tmp_path: Path) -> None:
    """By hand: it counts from the end of own training. Three times 0.1 s of latency do not fit into 0.3 s, and do into
    0.4 s, however long all train; an agent that takes 2 s where the quickest takes 1 s is heard within 1.4 s only."""
    late = {"simulate__network": {"latency_s": 0.1}, "schedule__round_deadline_s": 0.3}
    (warning,) = warnings(tmp_path, **late)
    assert warning.startswith("all 3 agents need 1 s or more to train and about 0.3 s until peers have their snapshot")
    assert not warnings(tmp_path, **{**late, "schedule__round_deadline_s": 0.4})
    assert not warnings(tmp_path, **{**late, "schedule": {"mode": "async", "round_deadline_s": 0.3}})
    slow = {**late, "simulate__compute": {"speeds": {"agent-1": 0.5}}}
    (warning,) = warnings(tmp_path, **{**slow, "schedule__round_deadline_s": 1.2})
    assert warning.startswith(
        "agent-1 need 2 s or more to train and about 0.3 s until peers have their snapshot; the fastest agent trains "
        "for 1 s and then waits for 1.2 s (schedule.round_deadline_s)"
    )
    assert not warnings(tmp_path, **{**slow, "schedule__round_deadline_s": 1.4})


def test_agents_whose_peers_die_by_crash_points_are_alone_too(tmp_path: Path) -> None:
    """By hand: on a path the middle one loses both ends, one by a crash point and one by the clock; not where one of
    them is started again."""
    faults = [crash("agent-0", 1, "train"), {"kind": "crash", "agent": "agent-2", "at_s": 1.5}]
    assert warnings(tmp_path, simulate__faults=faults) == (
        "agent-1 is alone in the end: its peers go for good (agent-0 in round 1, agent-2 at 1.5 s)",
    )
    faults[0]["restart_after_s"] = 1.0
    assert warnings(tmp_path, simulate__faults=faults) == ()


def test_settings_of_real_agents_are_named(tmp_path: Path) -> None:
    """A file for real agents can be simulated; what the simulator does not do is said."""
    exchange = {"encoding": "int8", "delta": True, "rate_limit_mb_s": 3.0}
    scenario = prepare(tiny_experiment(tmp_path, exchange=exchange))
    assert any(warning.startswith("exchange.delta, exchange.rate_limit_mb_s: ") for warning in scenario.warnings)
    assert (scenario.config.exchange.encoding, scenario.config.exchange.delta) == ("int8", False)
