"""Moments of an agent's optimizer beside its weights: recorded, merged, refused, adopted, resumed.

References: plain means of the optimizers' states, and training that was not interrupted.
"""

from __future__ import annotations

import copy
import re
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dimat.agent.learner.learner import Learner
from dimat.agent.learner.shared_moments import SharedMoments
from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.state import MachineState
from dimat.merge import plan_merge
from dimat.symmetry import random_permutations
from dimat.symmetry.moments import move_state
from tests.agent.learner.rounds import merged, trained
from tests.agent.learner.test_learner import agents

STATE = MachineState("tiny", "agent-0", 1, "trained", BasisId(0, "agent-0", "0"))
TRAIN = {"epochs_per_round": 2, "batch_size": 16, "optimizer": {"name": "adam", "lr": 0.01}}


def pair(tmp_path: Path, moments: str = "fp32", **changes: Any) -> tuple[Learner, Learner, Path, Path]:
    """Two agents that have trained, and their snapshots."""
    train = {**TRAIN, "optimizer_state": "merged", **changes.pop("train", {})}
    one, two = agents(
        tmp_path, **{"merge__method": "average", "exchange": {"moments": moments}, **changes}, train=train
    )
    files = [one.store / f"{trained(agent, 1, learn=True).payload.root}.safetensors" for agent in (one, two)]
    return one, two, files[0], files[1]


def copies(agent: Learner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in agent.trainer.moments().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def altered(file: Path, to: Path, **changes: Any) -> Path:
    """Write a snapshot with other tensors in the place of some (`None`: without them)."""
    held = load_file(file)
    for name, value in changes.items():
        held = {k: t for k, t in held.items() if not k.startswith(f"aux.{name}")}
        if value is not None:
            held[f"aux.{name}"] = value
    save_file(held, to)
    return to


@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
def test_moments_are_averaged_with_the_weights(tmp_path: Path, moments: str) -> None:
    """Reference: the plain mean of both optimizers' states, exactly in fp32. A peer that is refused does not count."""
    one, two, _, theirs = pair(tmp_path, moments)
    own, other = copies(one), copies(two)
    bad = altered(theirs, tmp_path / "bad.safetensors", **{"moment.exp_avg.1.bias": torch.full((12,), nan)})
    parts = [("eve", bad, 0.2, True), ("two", theirs, 0.3, True)]
    report = merged(one, 1, 0.5, parts, "none")
    assert list(report.refused) == ["eve"]
    assert report.refused["eve"] == "eve: moment 'exp_avg.1.bias' holds values that are negative or not finite"
    tolerance = {"fp32": 1e-5, "bf16": 1e-2, "int8": 0.1}[moments]
    for name, tensor in one.trainer.moments().items():
        torch.testing.assert_close(tensor, 0.7 * own[name] + 0.3 * other[name], rtol=tolerance, atol=1e-6)


def test_layers_that_are_held_back_hold_their_moments_back(tmp_path: Path) -> None:
    """`merge.layers` and `merge.outer`: an own head keeps its moments, and half a step is half a step of both."""
    merge = {"method": "average", "layers": {"5.*": 0.0}, "outer": {"name": "none", "lr": 0.5}}
    one, two, _, theirs = pair(tmp_path, merge=merge)
    own, other = copies(one), copies(two)
    merged(one, 1, 0.5, [("two", theirs, 0.5, True)], "none")
    for name, tensor in one.trainer.moments().items():
        part = 0.0 if ".5." in name else 0.25
        torch.testing.assert_close(tensor, own[name].lerp(other[name], part), rtol=1e-5, atol=1e-8)


def test_a_peer_without_moments_counts_with_its_weights(tmp_path: Path) -> None:
    """It has trained nothing: its part of the moments is own's."""
    one, two, _, theirs = pair(tmp_path)
    own = copies(one)
    bare = altered(theirs, tmp_path / "bare.safetensors", moment=None)
    expected = {k: 0.5 * v + 0.5 * two.trainer.weights()[k] for k, v in one.trainer.weights().items()}
    assert merged(one, 1, 0.5, [("two", bare, 0.5, True)], "none").refused == {}
    for key, tensor in one.trainer.weights().items():
        torch.testing.assert_close(tensor, expected[key])
    assert same(copies(one), own)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"moment.exp_avg.1.bias": torch.zeros(3)}, "'exp_avg.1.bias' is [3], expected [12]"),
        ({"moment.exp_avg_sq.1.bias": torch.full((12,), -1.0)}, "'exp_avg_sq.1.bias' holds values that are negative"),
        ({"moment.exp_avg_sq.1.bias": None}, "'exp_avg_sq.1.bias' is missing"),
        ({"moment.step.1.bias": torch.tensor(1e20, dtype=torch.float64)}, "'step.1.bias' is not a count of steps"),
        ({"fisher.1.bias": torch.ones(12)}, "'aux.fisher.1.bias' is not in our model"),
    ],
)
def test_a_peer_that_sends_what_it_may_not_is_refused_whole(tmp_path: Path, change: Any, said: str) -> None:
    """Weights too: nothing changes, and a line says why."""
    one, _, _, theirs = pair(tmp_path)
    before, own = one.trainer.weights(), copies(one)
    bad = altered(theirs, tmp_path / "bad.safetensors", **change)
    report = merged(one, 1, 0.5, [("two", bad, 0.5, True)], "none")
    assert said in report.refused["two"]
    assert all(torch.equal(v, before[k]) for k, v in one.trainer.weights().items())
    assert same(copies(one), own)


def test_an_agent_that_merges_none_takes_none(tmp_path: Path) -> None:
    """To it moments are tensors too many; their agreement is compared before, when agents meet."""
    (tmp_path / "kept").mkdir()
    _, _, _, theirs = pair(tmp_path)
    one, _ = agents(tmp_path / "kept", merge__method="average")
    trained(one, 1, learn=True)
    report = merged(one, 1, 0.5, [("two", theirs, 0.5, True)], "none")
    assert re.search(r"'aux\.moment\.\w+\.1\.bias' is not in our model", report.refused["two"])


def test_huge_moments_are_told_and_bounded(tmp_path: Path) -> None:
    """They count as ten times what own training has made, weights as they are."""
    one, _, _, theirs = pair(tmp_path)
    own = copies(one)
    huge = altered(theirs, tmp_path / "huge.safetensors", **{"moment.exp_avg_sq.1.bias": torch.full((12,), 1e6)})
    report = merged(one, 1, 0.5, [("two", huge, 0.5, True)], "none")
    assert report.refused == {}
    assert "two: its optimizer's moments are up to" in report.notes[-1]
    assert "they count as 10 times" in report.notes[-1]
    after = one.trainer.moments()["exp_avg_sq.1.bias"]
    usual = max(float(tensor.mean()) for name, tensor in own.items() if name.startswith("exp_avg_sq"))
    assert float(after.mean()) < 100 * usual


def test_a_merge_that_is_taken_back_leaves_moments_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its metrics are not finite: own weights go on, and so do own moments."""
    one, _, _, theirs = pair(tmp_path)
    before, own, evaluate = one.trainer.weights(), copies(one), one.trainer.evaluate

    def judged(*given: Any) -> dict[str, float]:
        kept = torch.equal(one.trainer.weights()["1.weight"], before["1.weight"])
        return evaluate(*given) if kept else {**evaluate(*given), "loss": nan}

    monkeypatch.setattr(one.trainer, "evaluate", judged)
    report = merged(one, 1, 0.5, [("two", theirs, 0.5, True)], "after")
    assert report.accepted == 0
    assert same(copies(one), own)


def test_a_peer_in_another_basis_is_permuted_with_its_moments(tmp_path: Path) -> None:
    """Planted permutation: a copy of the agent with its units in another order, moments too, merged with alignment:
    the agent stays what it is."""
    one, _, mine, _ = pair(tmp_path, merge={"method": "dimat-paper", "repair": "none"})
    before, own = one.trainer.weights(), copies(one)
    assert one.spec is not None
    planted = random_permutations(one.spec, torch.Generator().manual_seed(5))
    one.trainer.permute(one.spec, planted)
    away = one.record()
    other = one.store / f"{away.payload.root}.safetensors"
    assert not torch.equal(one.trainer.weights()["1.weight"], before["1.weight"])
    assert not same(copies(one), own)
    one.trainer.load_weights(before)
    one.trainer.load_moments(own)
    report = merged(one, 1, 0.5, [("copy", other, 0.5, False)], "none")
    assert report.refused == {}
    assert report.moved["copy"] > 0
    for name, tensor in one.trainer.moments().items():
        torch.testing.assert_close(tensor, own[name], rtol=1e-5, atol=1e-9)
    assert mine.exists()


def test_a_newcomer_that_adopts_weights_adopts_moments(tmp_path: Path) -> None:
    """Sent in fp32: the optimizer's state is the neighbour's, to the rounding of a root and its square; a snapshot that
    cannot be is refused, and nothing changes."""
    one, two, _, theirs = pair(tmp_path)
    own = copies(one)
    bad = altered(theirs, tmp_path / "bad.safetensors", **{"moment.exp_avg.1.bias": torch.zeros(3)})
    assert "'exp_avg.1.bias' is [3], expected [12]" in one.adopt_weights("two", bad)
    assert same(copies(one), own)
    assert one.adopt_weights("two", theirs) == ""
    for name, tensor in one.trainer.moments().items():
        torch.testing.assert_close(tensor, two.trainer.moments()[name], rtol=1e-6, atol=1e-12)
    assert one.train(2, learn=True).notes == ()


def test_a_newcomer_with_an_optimizer_of_more_than_moments_begins_anew(tmp_path: Path) -> None:
    """NAdam multiplies its momenta up: that does not travel, and a note says what begins anew."""
    optimizer = {"optimizer": {"name": "torch.optim.NAdam"}}
    one, _, _, theirs = pair(tmp_path, train=optimizer)
    assert one.adopt_weights("two", theirs) == ""
    assert one.trainer.moments() == {}
    assert one.train(2, learn=True).notes == (
        "the optimizer's state is reset for 1.weight, 1.bias, 3.weight and 3 more: it has state that is not exchanged",
    )


def test_what_is_not_sent_is_said_once(tmp_path: Path) -> None:
    """Adafactor's rows and columns."""
    one, _ = agents(
        tmp_path,
        merge__method="average",
        train={**TRAIN, "optimizer_state": "merged", "optimizer": {"name": "torch.optim.Adafactor"}},
    )
    said = one.train(1, learn=True).notes
    assert len(said) == 1
    assert said[0].startswith('train.optimizer_state = "merged": col_var, row_var of Adafactor do not have')
    assert one.train(2, learn=True).notes == ()


@pytest.mark.parametrize("moments", ["int8", "fp32"])
def test_what_was_trained_is_published_again_to_the_bit(tmp_path: Path, moments: str) -> None:
    """An agent goes on from a checkpoint in another life: the same snapshot, and after the merge the same moments."""
    one, two, mine, theirs = pair(tmp_path, moments)
    saved = copy.deepcopy(one.checkpoint(STATE))
    again, _ = agents_like(one)
    again.restore(saved)
    assert again.record().payload.root == mine.stem
    for life in (one, again):
        merged(life, 1, 0.5, [("two", theirs, 0.5, True)], "none")
    assert same(copies(one), copies(again))
    assert saved.moment_norms == again.checkpoint(STATE).moment_norms != {}
    assert two.name != one.name


def agents_like(one: Learner) -> tuple[Learner, Learner]:
    """Two more lives of an agent."""
    lives = [Learner(one.name, one.config, one.task, one.indices, one.store, one.spec, durable=False) for _ in range(2)]
    return lives[0], lives[1]


def test_moments_move_with_the_basis(tmp_path: Path) -> None:
    """Reference: torch's state dict, moved by `move_state`."""
    one, _, _, _ = pair(tmp_path)
    assert one.spec is not None
    planted = random_permutations(one.spec, torch.Generator().manual_seed(3))
    names = dict(one.trainer.model.named_parameters())
    moved, _ = move_state(copy.deepcopy(one.trainer.optimizer.state_dict()), one.spec, planted, names)
    one.trainer.permute(one.spec, planted)
    for number, name in enumerate(names):
        assert torch.equal(one.trainer.moments()[f"exp_avg.{name}"], moved["state"][number]["exp_avg"])


def test_the_reference_follows_own_training_alone(tmp_path: Path) -> None:
    """A merge leaves it as it was."""
    one, _, _, theirs = pair(tmp_path)
    held = SharedMoments(one.trainer, "fp32", plan_merge(one.config.merge))
    held.after_training({})
    before = dict(held.norms)
    assert before == held.norms_now() == one.checkpoint(STATE).moment_norms
    merged(one, 1, 0.5, [("two", theirs, 0.5, True)], "none")
    assert one.checkpoint(STATE).moment_norms == before != held.norms_now()
