"""Plans of faults: scripts by hand, each contradiction's message, and laws of what is drawn."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dimat.config import ExperimentConfig, build
from dimat.errors import ConfigError
from dimat.simulate.world.faults import (
    Crash,
    CrashPoint,
    Cut,
    FaultPlan,
    Heal,
    Join,
    Leave,
    Restart,
    Slow,
    plan_faults,
)

AGENTS = ("lab-a", "lab-b", "lab-c", "lab-d")


def experiment(script: list[dict[str, Any]], seed: int = 0, **chance: Any) -> ExperimentConfig:
    simulate = {"faults": script, "random_faults": chance}
    return build(ExperimentConfig, {"seed": seed, "simulate": simulate}, "the test")


def plan(script: list[dict[str, Any]], **chance: Any) -> FaultPlan:
    return plan_faults(experiment(script, **chance), AGENTS)


def entry(kind: str, agent: str, at_s: float, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "agent": agent, "at_s": at_s, **more}


def test_nothing_by_default() -> None:
    """Reference: the settings' defaults; and one model on all data is no network."""
    assert plan([]) == FaultPlan((), (), frozenset())
    assert not plan([]).crashes
    tree = {"merge": {"method": "centralised"}, "simulate": {"faults": [entry("crash", "lab-a", 5)]}}
    assert plan_faults(build(ExperimentConfig, tree, "the test"), ("centralised",)) == FaultPlan()


def test_a_script_in_the_order_in_which_it_happens() -> None:
    """By hand, entries written in no order."""
    made = plan(
        [
            entry("slow", "lab-c", 30, factor=2.5),
            {"kind": "partition", "at_s": 5, "groups": [["lab-a", "lab-b"]], "heal_after_s": 20},
            entry("crash", "lab-a", 10, restart_after_s=7),
            entry("join", "lab-d", 3),
            {"kind": "partition", "at_s": 6, "groups": [["lab-a"], ["lab-c"]]},
            entry("leave", "lab-d", 12),
            {"kind": "crash", "agent": "lab-b", "round": 2, "on": "publish", "restart_after_s": 1},
            entry("crash", "lab-a", 20),
        ]
    )
    assert made.timed == (
        Join(3, "lab-d"),
        Cut(5, "simulate.faults[1]", (("lab-a", "lab-b"),)),
        Cut(6, "simulate.faults[4]", (("lab-a",), ("lab-c",))),
        Crash(10, "lab-a", 7),
        Leave(12, "lab-d"),
        Restart(17, "lab-a", Crash(10, "lab-a", 7)),
        Crash(20, "lab-a"),
        Heal(25, "simulate.faults[1]"),
        Slow(30, "lab-c", 2.5),
    )
    assert made.on_action == (CrashPoint("lab-b", 2, "publish", 1),)
    assert made.late == {"lab-d"}
    assert made.crashes
    assert plan([{"kind": "crash", "agent": "lab-b", "round": 2, "on": "train"}]).crashes


def test_at_the_same_time_what_mends_comes_first() -> None:
    """A restart at the moment of the next crash is no contradiction, nor is one without delay, nor a join at once."""
    made = plan([entry("crash", "lab-a", 10), entry("crash", "lab-a", 5, restart_after_s=5)])
    first = Crash(5, "lab-a", 5)
    assert made.timed == (first, Restart(10, "lab-a", first), Crash(10, "lab-a"))
    made = plan([entry("crash", "lab-a", 5, restart_after_s=0)] * 2)
    first = Crash(5, "lab-a", 0)
    assert made.timed == (first, Restart(5, "lab-a", first)) * 2
    made = plan([entry("leave", "lab-a", 5), entry("join", "lab-a", 5)])
    assert made.timed == (Join(5, "lab-a"), Leave(5, "lab-a"))


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            [entry("leave", "lab-b", 1), entry("crash", "lab-bb", 5)],
            "simulate.faults[1]: no agent 'lab-bb' in the topology; did you mean 'lab-b'?",
        ),
        (
            [{"kind": "partition", "at_s": 1, "groups": [["lab-a"], ["zoo"]]}],
            "simulate.faults[0]: no agent 'zoo' in the topology; use one of its 4 agents, e.g. 'lab-a'",
        ),
        (
            [entry("crash", "lab-a", 5, restart_after_s=5), entry("crash", "lab-a", 9)],
            "simulate.faults[1]: agent 'lab-a' crashes at 9 s, but it is down then; change the script",
        ),
        (
            [entry("crash", "lab-a", 9), entry("crash", "lab-a", 5)],
            "simulate.faults[0]: agent 'lab-a' crashes at 9 s, but it is down then; change the script",
        ),
        (
            [entry("leave", "lab-a", 5), entry("crash", "lab-a", 9)],
            "simulate.faults[1]: agent 'lab-a' crashes at 9 s, but it has left then; change the script",
        ),
        (
            [entry("join", "lab-a", 10), entry("crash", "lab-a", 9)],
            "simulate.faults[1]: agent 'lab-a' crashes at 9 s, but it has not joined yet then; change the script",
        ),
        (
            [entry("crash", "lab-a", 5, restart_after_s=5), entry("leave", "lab-a", 9)],
            "simulate.faults[1]: agent 'lab-a' leaves at 9 s, but it is down then; change the script",
        ),
        (
            [entry("leave", "lab-a", 5), entry("leave", "lab-a", 9)],
            "simulate.faults[1]: agent 'lab-a' leaves at 9 s, but it has left then; change the script",
        ),
        (
            [entry("leave", "lab-a", 5), entry("join", "lab-a", 9)],
            "simulate.faults[0]: agent 'lab-a' leaves at 5 s, but it has not joined yet then; change the script",
        ),
        (
            [entry("leave", "lab-a", 5), entry("slow", "lab-a", 9, factor=2)],
            "simulate.faults[1]: agent 'lab-a' is slowed down at 9 s, but it has left then; change the script",
        ),
        (
            [entry("join", "lab-a", 5), entry("join", "lab-a", 9)],
            "simulate.faults[1]: agent 'lab-a' already joins by simulate.faults[0]; "
            "to let it come back, use a crash with restart_after_s",
        ),
        (
            [entry("join", name, 5) for name in AGENTS],
            "simulate.faults[3]: all 4 agents join later, so nobody starts the network; "
            "let one agent start without a join",
        ),
        (
            [{"kind": "partition", "at_s": 1, "groups": [["lab-a", "lab-b"], ["lab-b"]]}],
            "simulate.faults[0]: agent 'lab-b' is in the groups twice; name it once",
        ),
        (
            [{"kind": "partition", "at_s": 1, "groups": [list(AGENTS)]}],
            "simulate.faults[0]: one group of all agents separates nobody; leave some out or name two groups",
        ),
        (
            [{"kind": "partition", "at_s": 1, "groups": [["lab-a"], []]}],
            "simulate.faults[0]: a group is empty; name its agents, or leave it out",
        ),
        (
            [{"kind": "crash", "agent": "lab-a", "round": 2, "on": "merge", "restart_after_s": 1}] * 2,
            "simulate.faults[1] is the same crash as simulate.faults[0]; remove one",
        ),
        (
            [
                {"kind": "crash", "agent": "lab-a", "round": 5, "on": "merge"},
                {"kind": "crash", "agent": "lab-a", "round": 2, "on": "merge"},
            ],
            "simulate.faults[0]: agent 'lab-a' crashes in round 5, but simulate.faults[1] takes it down for good in "
            "round 2; give that one restart_after_s",
        ),
        (
            [{"kind": "crash", "agent": "lab-a", "round": number, "on": "trained"} for number in (2, 5)],
            "simulate.faults[1]: agent 'lab-a' crashes in round 5, but simulate.faults[0] takes it down for good in "
            "round 2; give that one restart_after_s",
        ),
    ],
)
def test_contradictions(script: list[dict[str, Any]], said: str) -> None:
    """Reference: the list in the docstring of plan_faults. One line each, naming the entry."""
    with pytest.raises(ConfigError) as error:
        plan(script)
    assert str(error.value) == said


def test_random_crashes_are_a_poisson_process_of_time_up() -> None:
    """Rate 6 per hour up and 5 min down on average: a renewal process of mean cycle 10 + 5 min; over 200 h of 4
    agents its count is 3,200 within four standard deviations (σ² = t·var/mean³), fixed seed."""
    hours = 200
    made = plan([], crashes_per_hour=6, mean_down_s=300, until_s=hours * 3600)
    crashes = [fault for fault in made.timed if isinstance(fault, Crash)]
    mean, variance = 600 + 300, 600**2 + 300**2
    sigma = (4 * hours * 3600 * variance / mean**3) ** 0.5
    assert abs(len(crashes) - 4 * hours * 3600 / mean) < 4 * sigma
    restarts = [fault for fault in made.timed if isinstance(fault, Restart)]
    downs = [fault.at_s - fault.crash.at_s for fault in restarts]
    assert downs == pytest.approx([fault.crash.restart_after_s for fault in restarts])
    assert sorted(fault.crash.at_s for fault in restarts) == [fault.at_s for fault in crashes]
    assert sum(downs) / len(downs) == pytest.approx(300, abs=4 * 300 / len(downs) ** 0.5)


def test_random_partitions() -> None:
    """30 per hour over 100 h: 3,000 within four standard deviations; two groups that hold every agent once."""
    made = plan([], partitions_per_hour=30, mean_partition_s=60, until_s=360_000)
    cuts = {fault.id: fault for fault in made.timed if isinstance(fault, Cut)}
    heals = {fault.id: fault for fault in made.timed if isinstance(fault, Heal)}
    assert abs(len(cuts) - 3000) < 4 * 3000**0.5
    assert cuts.keys() == heals.keys()
    lengths = [heals[id].at_s - cut.at_s for id, cut in cuts.items()]
    assert sum(lengths) / len(lengths) == pytest.approx(60, abs=4 * 60 / len(lengths) ** 0.5)
    for cut in cuts.values():
        assert len(cut.groups) == 2
        assert all(cut.groups)
        assert sorted(name for group in cut.groups for name in group) == sorted(AGENTS)
    assert len({cut.groups for cut in cuts.values()}) == 2 ** len(AGENTS) - 2
    config = experiment([], partitions_per_hour=30, until_s=3600)
    assert plan_faults(config, ["alone"]) == FaultPlan()


SCRIPT = [
    entry("crash", "lab-a", 300, restart_after_s=200),
    entry("crash", "lab-a", 900),
    entry("join", "lab-b", 400),
    entry("leave", "lab-b", 1000),
    {"kind": "partition", "at_s": 5, "groups": [["lab-a"]], "heal_after_s": 20},
]


@given(st.integers(0, 10_000), st.sampled_from([1, 30, 300]), st.sampled_from([1, 100, 10_000]))
def test_random_faults_fit_into_the_script(seed: int, rate: float, down: float) -> None:
    """Law: only who is up crashes, only who is down restarts, from the crash that it is down by; the script
    happens as written; nothing random begins after until_s; times do not fall."""
    made = plan(SCRIPT, seed=seed, crashes_per_hour=rate, mean_down_s=down, partitions_per_hour=rate, until_s=1200)
    state = {name: "late" if name in made.late else "up" for name in AGENTS}
    by: dict[str, Crash] = {}
    cut: set[str] = set()
    assert [fault.at_s for fault in made.timed] == sorted(fault.at_s for fault in made.timed)
    for fault in made.timed:
        match fault:
            case Crash():
                assert state[fault.agent] == "up"
                assert fault.at_s < 1200
                state[fault.agent] = "down"
                by[fault.agent] = fault
            case Restart():
                assert state[fault.agent] == "down"
                assert fault.crash is by[fault.agent]
                state[fault.agent] = "up"
            case Join():
                assert state[fault.agent] == "late"
                state[fault.agent] = "up"
            case Leave():
                assert state[fault.agent] == "up"
                state[fault.agent] = "gone"
            case Cut():
                cut.add(fault.id)
            case Heal():
                cut.remove(fault.id)
            case Slow():
                raise AssertionError("nobody asked for it")
    assert state["lab-a"] == "down"
    assert state["lab-b"] == "gone"
    assert not cut
    written = {
        Crash(300, "lab-a", 200),
        Restart(500, "lab-a", Crash(300, "lab-a", 200)),
        Crash(900, "lab-a"),
        Join(400, "lab-b"),
        Leave(1000, "lab-b"),
    }
    assert written <= set(made.timed)


def test_equal_seeds_give_equal_faults_and_agents_draw_apart() -> None:
    """Law: an agent's crashes depend on the seed and its name alone."""
    chance = {"crashes_per_hour": 20, "until_s": 36_000}
    few = plan_faults(experiment([], **chance), AGENTS[:2])
    all_of_them = plan_faults(experiment([], **chance), AGENTS[::-1])
    assert few == plan_faults(experiment([], **chance), AGENTS[:2])
    assert few != plan_faults(experiment([], seed=1, **chance), AGENTS[:2])
    for name in AGENTS[:2]:
        own = [[f for f in made.timed if isinstance(f, Crash) and f.agent == name] for made in (few, all_of_them)]
        assert own[0] == own[1]
        assert len(own[0]) > 50
    first, second = ({f.at_s for f in few.timed if f.agent == name} for name in AGENTS[:2])
    assert not first & second
