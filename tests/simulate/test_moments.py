"""Simulated runs whose agents merge their optimizers' moments. Reference: a loop by hand, on torch's own Adam."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dimat import events
from dimat.events import Event
from dimat.simulate import run_simulation
from dimat.simulate.world.scenario import prepare
from dimat.tasks import Subset
from dimat.train.trainer import Trainer
from dimat.weights.tensors import encode
from tests.simulate.helpers import TINY_TASK, tiny_experiment

MIXING = ((2 / 3, 1 / 3, 0), (1 / 3, 1 / 3, 1 / 3), (0, 1 / 3, 2 / 3))
"""Metropolis on a path of three."""
ROUNDS = 3


def experiment(folder: Path, **changes: Any) -> Any:
    """Three agents from one start, with layers large enough to be encoded."""
    train = {
        "epochs_per_round": 2,
        "batch_size": 16,
        "optimizer": {"name": "adam", "lr": 0.01},
        "initialisation": "shared",
        "optimizer_state": "merged",
        **changes.pop("train", {}),
    }
    config = tiny_experiment(
        folder, **{"merge": {"method": "average"}, "schedule": {"rounds": ROUNDS}, **changes}, train=train
    )
    (folder / "tiny_task.py").write_text(TINY_TASK.replace("12, 8", "64, 32"))
    return config


def final_weights(out: Path) -> list[dict[str, Tensor]]:
    return [load_file(file) for file in sorted((out / "final").iterdir())]


def by_hand(config: Any) -> list[dict[str, Tensor]]:
    """Train three models with torch's Adam, and after each round average weights, moments and counts."""
    scenario = prepare(config)
    kept = config.train.model_copy(update={"optimizer_state": "kept"})
    trainers = [
        Trainer(scenario.task, Subset(scenario.task.data("train"), part), kept, seed=0, path=("agent", name))
        for name, part in zip(scenario.agents, scenario.parts, strict=True)
    ]
    for number in range(1, ROUNDS + 1):
        for trainer in trainers:
            trainer.train(number)
        weights = [trainer.weights() for trainer in trainers]
        states = [[{k: v.clone() for k, v in s.items()} for s in t.optimizer.state.values()] for t in trainers]
        for row, trainer in zip(MIXING, trainers, strict=True):
            means = {k: sum(w * each[k] for w, each in zip(row, weights, strict=True)) for k in weights[0]}
            trainer.load_weights(means)
            for place, state in enumerate(trainer.optimizer.state.values()):
                for entry in ("exp_avg", "exp_avg_sq", "step"):
                    state[entry].copy_(sum(w * each[place][entry] for w, each in zip(row, states, strict=True)))
                state["step"].round_()
    return [trainer.weights() for trainer in trainers]


def far(one: list[dict[str, Tensor]], two: list[dict[str, Tensor]]) -> float:
    """Return the norm of the difference of two runs' weights as a share of the norm."""
    pairs = [(a[k], b[k]) for a, b in zip(one, two, strict=True) for k in b]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5


def test_a_run_is_the_loop_by_hand(tmp_path: Path) -> None:
    """To 1e-5 where moments travel in fp32; in 8 bits much closer than where they are kept by each agent."""
    found: dict[str, list[dict[str, Tensor]]] = {}
    for moments, state in (("fp32", "merged"), ("int8", "merged"), ("bf16", "merged"), ("int8", "kept")):
        config = experiment(tmp_path, train={"optimizer_state": state}, exchange={"moments": moments})
        out = tmp_path / f"{moments}-{state}"
        results = run_simulation(config, out=out)
        assert results.warnings == []
        found[f"{moments}-{state}"] = final_weights(out)
    reference = by_hand(experiment(tmp_path))
    away = {name: far(weights, reference) for name, weights in found.items()}
    assert away["fp32-merged"] < 1e-5
    assert away["bf16-merged"] < 0.2 * away["int8-kept"]
    assert away["int8-merged"] < 0.5 * away["int8-kept"]


@pytest.mark.parametrize(("moments", "bytes_a_number"), [("int8", 1), ("bf16", 2), ("fp32", 4)])
def test_moments_are_counted_as_bytes(tmp_path: Path, moments: str, bytes_a_number: int) -> None:
    """A snapshot is as long as is said before the run; final weights have none."""
    heard: list[Event] = []
    config = experiment(tmp_path, exchange={"moments": moments}, schedule={"rounds": 1})
    results = run_simulation(config, out=tmp_path / "run", listeners=[heard.append])
    assert {fact.bytes for fact in heard if isinstance(fact, events.Published)} == {results.snapshot_bytes}
    own = final_weights(tmp_path / "run")[1]
    assert not any(name.startswith("aux.") for name in own)
    extra: dict[str, Tensor] = {}
    types = {1: torch.int8, 2: torch.bfloat16, 4: torch.float32}
    for name, tensor in own.items():
        coded = tensor.numel() >= 1024
        for entry in ("exp_avg", "exp_avg_sq"):
            extra[f"aux.moment.{entry}.{name}"] = tensor.to(types[bytes_a_number] if coded else torch.float32)
            if coded and bytes_a_number == 1:
                extra[f"aux.moment-scale.{entry}.{name}"] = torch.zeros(-(-tensor.numel() // 256))
        extra[f"aux.moment.step.{name}"] = torch.zeros((), dtype=torch.float64)
    assert results.snapshot_bytes == len(encode({**own, **extra}))
    assert {row.bytes_sent for row in results.rows if row.agent == "agent-1"} == {2 * results.snapshot_bytes}
    assert not [fact for fact in heard if isinstance(fact, events.PeerRefused | events.Warned)]


@pytest.mark.live
def test_workers_and_rounds_without_training(tmp_path: Path) -> None:
    """Equal bits on one worker and on two, aligned, with statistics beside, and in the rounds of a final merge."""
    changes = {
        "merge": {"method": "dimat", "combine": "fisher"},
        "schedule": {"rounds": 2, "final_merge": True},
        "train": {"initialisation": "own"},
    }
    runs: list[list[dict[str, Tensor]]] = []
    for workers in (1, 2):
        out = tmp_path / f"workers-{workers}"
        config = experiment(tmp_path, **changes, simulate={"workers": workers})
        heard: list[Event] = []
        results = run_simulation(config, out=out, listeners=[heard.append])
        assert all(row.heard == row.expected for row in results.rows)
        assert not [fact for fact in heard if isinstance(fact, events.PeerRefused | events.Warned)]
        runs.append(final_weights(out))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(*runs, strict=True) for k in a)


def test_moments_travel_once_after_each_training(tmp_path: Path) -> None:
    """Further mixing steps and the final merge move weights alone: by bytes, those of a run that keeps its moments."""
    sizes: dict[str, list[int]] = {}
    schedule = {"rounds": 2, "mixing_steps": 2, "final_merge": True}
    for state in ("merged", "kept"):
        heard: list[Event] = []
        config = experiment(tmp_path, train={"optimizer_state": state}, schedule=schedule)
        run_simulation(config, listeners=[heard.append])
        sizes[state] = [f.bytes for f in heard if isinstance(f, events.Published) and f.agent == "agent-0"]
    (plain,) = set(sizes["kept"])
    whole = sizes["merged"][0]
    assert whole > plain
    assert sizes["merged"][:4] == [whole, plain, whole, plain]
    assert set(sizes["merged"][4:]) == {plain}
    assert len(sizes["merged"]) == len(sizes["kept"]) > 4
