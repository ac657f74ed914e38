"""Whole simulated runs under failures: crashes at every action, late joins, leaves, partitions, slow and lossy links.

Reference throughout: the same experiment without the failure, and the promises of `dimat.agent.protocol.round`.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dimat import events
from dimat.agent.lineage.lineage import lineage, read_records
from dimat.config import ExperimentConfig
from dimat.errors import ConfigError
from dimat.events import Event
from dimat.results import AgentRound, Results
from dimat.simulate import run_simulation
from dimat.simulate.world.scenario import prepare
from tests.simulate.helpers import tiny_experiment

# agent-2 is slow and agent-1 hears it: a crash of any of them hits neighbours that wait, train and fetch
BUSY: dict[str, Any] = {"compute": {"speeds": {"agent-2": 0.5}}, "network": {"latency_s": [0.01, 0.05]}, "workers": 1}


def run(config: ExperimentConfig, out: Path) -> tuple[Results, list[Event], dict[str, dict[str, torch.Tensor]]]:
    heard: list[Event] = []
    results = run_simulation(config, out=out, listeners=[heard.append])
    return results, heard, {file.stem: load_file(file) for file in sorted((out / "final").iterdir())}


def told(heard: list[Event], kind: type[Event]) -> list[Any]:
    return [fact for fact in heard if isinstance(fact, kind)]


def learned(results: Results) -> dict[tuple[str, int], AgentRound]:
    """Rows without when they came about and without what the network moved for them."""
    timeless = {"time_s": 0.0, "bytes_sent": 0, "bytes_received": 0}
    return {(row.agent, row.round): row.model_copy(update=timeless) for row in results.rows}


@pytest.mark.parametrize(
    ("method", "moment"),
    [
        *(("average", moment) for moment in ("train", "trained", "publish", "fetch", "merge", "merged")),
        *(("dimat", moment) for moment in ("train", "trained", "publish", "fetch", "adopt", "merge", "merged")),
        *(("fisher", moment) for moment in ("trained", "adopt", "merge")),
        ("regmean", "merge"),
    ],
)
def test_a_crash_at_any_action_changes_no_bit(tmp_path: Path, method: str, moment: str) -> None:
    """An agent killed when it is asked to do anything, and restarted within the deadline, ends with the same bits, and
    so do all others: weights, metrics, bases and contributions equal the uninterrupted run's. "fisher" and "regmean"
    align, and merge with statistics that travel with the weights."""
    merge = {"method": "dimat", "combine": method} if method in ("fisher", "regmean") else {"method": method}
    plain = tiny_experiment(tmp_path, merge=merge, simulate=BUSY)
    reference, _, weights = run(plain, tmp_path / "reference")
    hit = 0
    for number in (1, 2):
        for agent in ("agent-1", "agent-2"):
            fault = {"kind": "crash", "agent": agent, "round": number, "on": moment, "restart_after_s": 0.4}
            config = tiny_experiment(tmp_path, merge=merge, simulate={**BUSY, "faults": [fault]})
            out = tmp_path / f"{agent}-{number}"
            results, heard, others = run(config, out)
            assert not told(heard, events.PeerLate)
            assert learned(results) == learned(reference)
            assert others.keys() == weights.keys()
            assert all(torch.equal(others[a][k], weights[a][k]) for a in weights for k in weights[a])
            assert read_records(out / "lineage.jsonl")[-1].round == 3
            hit += len(told(heard, events.AgentCrashed))
    expected = {"adopt": 1}.get(moment, 4)
    assert hit >= expected, "the crash happened where the action exists"


def test_damage_of_the_newest_checkpoint_costs_a_round_not_the_agent(tmp_path: Path) -> None:
    """The checkpoint before is used; no (agent, round) is published with other content than before."""
    fault = {"kind": "crash", "agent": "agent-1", "at_s": 1.2, "restart_after_s": 1.0}
    config = tiny_experiment(tmp_path, simulate={"faults": [fault], "workers": 1}, schedule__rounds=5)
    out = tmp_path / "run"
    roots: dict[tuple[str, int], set[str]] = {}
    seen: list[Event] = []

    def listen(fact: Event) -> None:
        seen.append(fact)
        if isinstance(fact, events.Published):
            roots.setdefault((fact.agent, fact.round), set()).add(fact.snapshot)
        if isinstance(fact, events.AgentCrashed):
            newest = max((out / "checkpoints" / "agent-1").glob("*.safetensors"))
            newest.write_bytes(newest.read_bytes()[:-100])

    results = run_simulation(config, out=out, listeners=[listen])
    resumed = told(seen, events.Resumed)
    assert [(fact.agent, fact.round, fact.stage) for fact in resumed] == [("agent-1", 1, "trained")]
    assert all(len(found) == 1 for found in roots.values())
    assert max(row.round for row in results.rows if row.agent == "agent-1") == 5


@pytest.mark.parametrize("join", ["adopt", "align"])
def test_a_late_joiner_takes_the_networks_round_and_basis(tmp_path: Path, join: str) -> None:
    """It joins at the round that the network is at, never moves the network's basis, and its lineage says so."""
    config = tiny_experiment(
        tmp_path,
        schedule={"rounds": 7, "round_deadline_s": 3, "join": join},
        simulate={"faults": [{"kind": "join", "agent": "agent-2", "at_s": 4.5}], "workers": 1},
    )
    out = tmp_path / "run"
    results, heard, _ = run(config, out)
    (joined,) = told(heard, events.Joined)
    assert joined.how == join
    assert joined.round > 1
    first = min(row.round for row in results.rows if row.agent == "agent-2")
    assert first == joined.round
    bases = {row.basis for row in results.rows if row.round == 7}
    assert len(bases) == 1
    assert next(iter(bases)) == next(row.basis for row in results.rows if row.round == first - 1)
    model = lineage(read_records(out / "lineage.jsonl"), "agent-2")
    assert sum(model.initial.values()) == pytest.approx(1, abs=1e-12)
    assert sum(model.shares().values()) == pytest.approx(1, abs=1e-12)
    own = model.initial.get("agent-2", 0.0)
    assert own == 0 if join == "adopt" else own > 0


def test_a_partition_heals_and_both_sides_settle_on_one_basis(tmp_path: Path) -> None:
    """Two groups that settled apart meet again: one basis id, the smallest, within diameter rounds of the healing."""
    cut = {"kind": "partition", "at_s": 0.5, "groups": [["agent-0", "agent-1"], ["agent-2", "agent-3"]]}
    config = tiny_experiment(
        tmp_path,
        topology={"graph": "path", "agents": 4},
        schedule={"rounds": 10, "round_deadline_s": 2},
        simulate={"faults": [{**cut, "heal_after_s": 6}], "workers": 1},
    )
    results, heard, _ = run(config, tmp_path / "run")
    (healed,) = told(heard, events.LinksHealed)
    before = [row for row in results.rows if row.time_s < healed.time_s]
    apart = {row.basis for row in before if row.round == max(r.round for r in before)}
    assert len(apart) == 2, "each side has its own"
    last = {row.basis for row in results.rows if row.round == 10}
    assert last == {min(apart, key=lambda basis: basis.split(":")[1])}


def test_a_crash_for_good_costs_neighbours_one_deadline(tmp_path: Path) -> None:
    """Nobody waits twice for the dead; rounds go on, weights sum to 1, and the run ends."""
    config = tiny_experiment(
        tmp_path,
        topology={"graph": "ring", "agents": 4},
        schedule={"rounds": 6, "round_deadline_s": 10},
        simulate={"faults": [{"kind": "crash", "agent": "agent-3", "at_s": 1.5}], "workers": 1},
    )
    results, heard, _ = run(config, tmp_path / "run")
    for agent in ("agent-0", "agent-2"):
        late = [fact for fact in told(heard, events.PeerLate) if fact.agent == agent]
        assert {fact.peer for fact in late} == {"agent-3"}
        times = [row.time_s for row in results.rows if row.agent == agent]
        waits = [b - a for a, b in pairwise(times) if b - a > 5]
        assert len(waits) == 1
    for fact in told(heard, events.Merged):
        assert sum(part.weight for part in fact.contributions) == pytest.approx(1, abs=1e-12)
    assert {row.agent for row in results.rows if row.round == 6} == {"agent-0", "agent-1", "agent-2"}


def test_asynchronous_agents_do_not_wait_for_slow_ones(tmp_path: Path) -> None:
    """Each goes at its own pace; what is merged is at most max_staleness rounds behind, with decayed weight."""
    config = tiny_experiment(
        tmp_path,
        schedule={"rounds": 12, "mode": "async", "max_staleness": 2, "staleness_decay": 0.25},
        simulate={"compute": {"speeds": {"agent-1": 0.45}}, "network": {"latency_s": 0.01}, "workers": 1},
    )
    results, heard, _ = run(config, tmp_path / "run")
    ends = {row.agent: row.time_s for row in results.rows if row.round == 12}
    assert ends["agent-0"] < 13
    # once the others are through, the slow one goes on with the network's round, its last
    assert 13 < ends["agent-1"] < 20
    assert {fact.agent for fact in told(heard, events.RoundsSkipped)} == {"agent-1"}
    stale = 0
    for fact in told(heard, events.Merged):
        own = fact.contributions[0]
        for part in fact.contributions[1:]:
            behind = max(own.round - part.round, 0)
            assert behind <= 2
            assert part.weight == pytest.approx((1 / 3) * 0.25**behind)
            stale += behind > 0
    assert stale > 0


def test_push_sum_weight_is_kept_over_crashes_and_losses(tmp_path: Path) -> None:
    """Directed graph, lossy links, a crash with restart: shares that were missed come with later snapshots, so that
    all push-sum weight is there at the end of a run without losses in its last rounds; without any, always n."""
    topology = {"graph": "exponential", "agents": 5}
    clean = tiny_experiment(tmp_path, merge__method="sgp", topology=topology, schedule={"rounds": 6})
    results, _, _ = run(clean, tmp_path / "clean")
    for number in range(1, 7):
        weights = [row.push_weight for row in results.rows if row.round == number]
        assert sum(w or 0 for w in weights) == pytest.approx(5, abs=1e-9)
    fault = {"kind": "crash", "agent": "agent-2", "at_s": 2.5, "restart_after_s": 0.5}
    hurt = tiny_experiment(
        tmp_path,
        merge__method="sgp",
        topology=topology,
        schedule={"rounds": 6},
        simulate={"faults": [fault], "workers": 1},
    )
    again, heard, _ = run(hurt, tmp_path / "hurt")
    assert told(heard, events.AgentCrashed)
    assert [row.push_weight for row in again.rows] == [row.push_weight for row in results.rows]


def test_a_change_of_the_map_in_mid_run(tmp_path: Path) -> None:
    """From the given round on, merges list the peers of the new topology, and only them."""
    change = {"round": 3, "topology": {"edges": [["agent-0", "agent-2"], ["agent-2", "agent-1"]]}}
    config = tiny_experiment(
        tmp_path, topology={"edges": [["agent-0", "agent-1"], ["agent-1", "agent-2"]]}, schedule__changes=[change]
    )
    _, heard, _ = run(config, tmp_path / "run")
    peers = {(f.agent, f.round): {p.agent for p in f.contributions[1:]} for f in told(heard, events.Merged)}
    assert peers["agent-0", 2] == {"agent-1"}
    assert peers["agent-0", 3] == {"agent-2"}
    assert peers["agent-2", 3] == {"agent-0", "agent-1"}


def test_stop_rules(tmp_path: Path) -> None:
    """An endless run ends by its time, each agent after the round it is in; or when the target is reached."""
    by_time = tiny_experiment(tmp_path, schedule={"rounds": 0, "max_time_s": 3.5})
    results, heard, _ = run(by_time, tmp_path / "time")
    assert max(row.round for row in results.rows) == 4
    assert {fact.reason for fact in told(heard, events.AgentLeft)} == {"time"}
    by_target = tiny_experiment(tmp_path, schedule={"rounds": 0, "target": 0.55})
    results, heard, _ = run(by_target, tmp_path / "target")
    for fact in told(heard, events.AgentLeft):
        own = [row.after for row in results.rows if row.agent == fact.agent]
        assert fact.reason == "target"
        assert own[-1] is not None
        assert own[-1] >= 0.55
        assert all(value is not None and value < 0.55 for value in own[:-1])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule__min_peers": 3}, "no agent has more than 2 peers"),
        ({"simulate__faults": [{"kind": "leave", "agent": "agent-9", "at_s": 1}]}, "no agent 'agent-9'"),
        (
            {"schedule__changes": [{"round": 2, "topology": {"graph": "ring", "agents": 4}}]},
            "agent 'agent-3' is not in the first topology",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    """Bad input: one line that says what and where, exit code 2, and no run folder."""
    with pytest.raises(ConfigError, match=said) as caught:
        run_simulation(tiny_experiment(tmp_path, **changes), out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_is_likely_a_mistake_is_warned_of(tmp_path: Path) -> None:
    """A deadline shorter than some agents' training, and agents that faults leave alone."""
    slow = tiny_experiment(tmp_path, simulate={"compute": {"speeds": {"agent-1": 0.1}}}, schedule__round_deadline_s=4)
    (warning,) = prepare(slow).warnings
    assert warning.startswith(
        "agent-1 need 10 s or more to train; the fastest agent trains for 1 s and then waits for 4 s"
    )
    gone = {"kind": "leave", "agent": "agent-1", "at_s": 2}
    warnings = prepare(tiny_experiment(tmp_path, simulate={"faults": [gone]})).warnings
    assert [text.split(" is alone")[0] for text in warnings] == ["agent-0", "agent-2"]
    change = {"round": 2, "topology": {"edges": [["agent-0", "agent-1"]]}}
    smaller = tiny_experiment(tmp_path, schedule__changes=[change])
    assert prepare(smaller).warnings == ("from round 2 on the topology leaves agent-2 alone",)
    results, _, _ = run(smaller, tmp_path / "run")
    assert {(row.agent, row.expected) for row in results.rows if row.round == 2} == {
        ("agent-0", 1),
        ("agent-1", 1),
        ("agent-2", 0),
    }


def test_equal_seeds_give_equal_bits_under_random_faults(tmp_path: Path) -> None:
    """Standard: random crashes, partitions, latencies and losses come from the seed; workers change nothing."""
    simulate = {
        "network": {"latency_s": [0.01, 0.3], "bandwidth_mbit_s": [0.05, 1], "loss": 0.2},
        "compute": {"speed": [0.5, 2]},
        "random_faults": {
            "crashes_per_hour": 300,
            "mean_down_s": 2,
            "partitions_per_hour": 200,
            "mean_partition_s": 2,
            "until_s": 15,
        },
    }
    schedule = {"rounds": 8, "round_deadline_s": 4}
    outcomes = []
    for workers in (1, 2):
        config = tiny_experiment(tmp_path, schedule=schedule, simulate={**simulate, "workers": workers})
        results, heard, weights = run(config, tmp_path / f"w{workers}")
        outcomes.append((results.rows, weights, len(told(heard, events.AgentCrashed))))
    (rows, weights, crashes), (others, other_weights, _) = outcomes
    assert crashes > 0
    assert rows == others
    assert all(torch.equal(other_weights[a][k], weights[a][k]) for a in weights for k in weights[a])
