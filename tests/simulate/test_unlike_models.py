"""Simulated agents of unlike models, which learn from each other's logits.

References: the same run on other numbers of workers and with a crash; training alone; bytes counted by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dimat import events
from dimat.config import ExperimentConfig, build
from dimat.events import Event
from dimat.merge.shared_logits import LogitLayout
from dimat.results import Results
from dimat.simulate import run_simulation
from dimat.simulate.simulation import consensus_distances
from dimat.weights.tensors import encode, write_weights

MODELS = [
    {"agents": ["agent-1"], "options": {"model": "mlp", "hidden": [24]}},
    {"agents": ["agent-3"], "options": {"model": "vit", "width": 8}},
]
PLAIN = {"compute": {"step_s": 0.01}, "workers": 1}
Outcome = tuple[Results, list[Event], dict[str, dict[str, torch.Tensor]]]


def experiment(method: str = "distil", keep: int | None = None, **tables: Any) -> ExperimentConfig:
    """A ring of four: two CNNs, an MLP and a vision transformer, on skewed parts of digits."""
    options = {"combine": {"name": "distil", "options": {"steps": 40, "keep": keep}}} if method == "distil" else {}
    tree: dict[str, Any] = {
        "run": "unlike",
        "seed": 7,
        "topology": {"graph": "ring", "agents": 4},
        "task": {
            "name": "digits",
            "options": {"width": 8, "probe": 200},
            "partition": {"kind": "dirichlet", "alpha": 0.5},
            "models": MODELS,
        },
        "train": {"epochs_per_round": 1, "device": "cpu"},
        "merge": {"method": method, **options},
        "schedule": {"rounds": 3},
        "simulate": {"workers": 1},
    }
    return build(ExperimentConfig, {**tree, **tables}, "the test")


def run(config: ExperimentConfig, out: Path) -> Outcome:
    heard: list[Event] = []
    results = run_simulation(config, out=out, listeners=[heard.append])
    return results, heard, {file.stem: load_file(file) for file in sorted((out / "final").iterdir())}


def same(a: dict[str, dict[str, torch.Tensor]], b: dict[str, dict[str, torch.Tensor]]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n][k], b[n][k]) for n in a for k in a[n])


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run on one worker in which nothing fails."""
    return run(experiment(simulate=PLAIN), tmp_path_factory.mktemp("plain"))


def test_every_agent_does_better_than_alone_and_sends_only_logits(tmp_path: Path, outcome: Outcome) -> None:
    """Each agent's accuracy, whatever its model, against the same agent alone; bytes are those of the layout."""
    results, heard, weights = outcome
    alone, _, _ = run(experiment("isolated"), tmp_path / "alone")
    last = {row.agent: row.after for row in results.rows if row.round == 3}
    floor = {row.agent: row.after for row in alone.rows if row.round == 3}
    assert all(last[agent] > floor[agent] for agent in last), (last, floor)
    size = len(encode(LogitLayout(200, 10).sample()))
    assert results.snapshot_bytes == size
    assert {row.bytes_sent for row in results.rows} == {2 * size}
    shapes = {name: {key: t.shape for key, t in tensors.items()} for name, tensors in weights.items()}
    assert shapes["agent-0"] == shapes["agent-2"]
    assert "conv1.weight" in shapes["agent-0"]
    assert "positions" in shapes["agent-3"]
    assert "1.weight" in shapes["agent-1"]
    assert not any(isinstance(fact, events.PeerRefused | events.Warned) for fact in heard)


@pytest.mark.live
def test_equal_seeds_give_equal_bits_for_any_number_of_workers(tmp_path: Path, outcome: Outcome) -> None:
    """And another seed, or fewer logits, gives others."""
    first, _, weights = outcome
    several = {"simulate": {**PLAIN, "workers": 3}}
    again, _, others = run(experiment(**several), tmp_path / "three")
    assert same(weights, others)
    assert again.rows == first.rows
    for changes in ({"seed": 8}, {"keep": 3}):
        _, _, odd = run(experiment(**changes, schedule={"rounds": 1}), tmp_path / str(changes))
        assert not same(weights, odd)


@pytest.mark.parametrize("moment", ["trained", "publish", "merge", "merged"])
def test_a_crash_changes_no_bit(tmp_path: Path, outcome: Outcome, moment: str) -> None:
    """Killed at any step of a round and restarted: the checkpoint holds weights that its snapshot does not."""
    _, _, weights = outcome
    faults = [
        {"kind": "crash", "agent": agent, "round": 2, "on": moment, "restart_after_s": 0.1}
        for agent in ("agent-0", "agent-3")
    ]
    _, heard, others = run(experiment(simulate={**PLAIN, "faults": faults}), tmp_path / "crashed")
    assert sum(isinstance(fact, events.AgentCrashed) for fact in heard) == 2
    assert not any(isinstance(fact, events.PeerLate) for fact in heard)
    assert same(weights, others)


def test_a_newcomer_joins_with_its_own_model(tmp_path: Path) -> None:
    """A late joiner takes the network's round and keeps its weights: nobody could give it any."""
    join = {"kind": "join", "agent": "agent-1", "at_s": 3.0}
    simulate = {"compute": {"step_s": 0.05}, "workers": 1, "faults": [join]}
    results, heard, _ = run(experiment(simulate=simulate, schedule={"rounds": 4}), tmp_path / "late")
    joined = [fact for fact in heard if isinstance(fact, events.Joined)]
    assert [(fact.agent, fact.how) for fact in joined] == [("agent-1", "align")]
    assert {row.agent for row in results.rows if row.round == 4} == {f"agent-{k}" for k in range(4)}


def test_time_of_a_merge_counts_its_steps(tmp_path: Path) -> None:
    """In virtual time a merge takes the steps that are learned in it, as training does."""
    simulate = {"compute": {"step_s": 0.01, "merge_s": 0.0}, "workers": 1}
    ends: list[float] = []
    for method in ("isolated", "distil"):
        results, _, _ = run(experiment(method, simulate=simulate, schedule={"rounds": 1}), tmp_path / method)
        ends.append(max(row.time_s for row in results.rows))
    assert ends[1] - ends[0] == pytest.approx(40 * 0.01, rel=0.02)


def test_distances_are_among_like_models(tmp_path: Path) -> None:
    """Reference: the formula over the two that have the same tensors; a model of its own is at no distance."""
    states = {"a": {"w": torch.tensor([1.0, 0.0])}, "b": {"w": torch.tensor([3.0, 0.0])}, "c": {"v": torch.ones(3)}}
    for name, state in states.items():
        write_weights(tmp_path / f"{name}.safetensors", state)
    found = consensus_distances({name: tmp_path / f"{name}.safetensors" for name in ("a", "c", "b")})
    assert found == pytest.approx({"a": 0.5, "c": 0.0, "b": 0.5})
