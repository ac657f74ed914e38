"""First merges of agents with weights of their own. References: the steps one by one, by hand; whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dimat import events
from dimat.agent.learner.learner import Learner
from dimat.config import DistilConfig
from dimat.errors import ConfigError
from dimat.events import MergeResult
from tests.agent.learner.rounds import merged, trained
from tests.agent.learner.test_learner import agents
from tests.simulate.helpers import tiny_experiment
from tests.simulate.test_run import run, same

DISTIL = {"steps": 5, "weight": 0.6}


def schedule(first_merge: str) -> dict[str, Any]:
    return {"rounds": 3, "first_merge": first_merge, "distil": DISTIL}


def started(tmp_path: Path, first_merge: str, **changes: Any) -> tuple[Learner, Learner, dict[str, Path]]:
    """Return two agents after their first training, and their snapshots."""
    one, two = agents(tmp_path, schedule=schedule(first_merge), **changes)
    files = {each.name: one.store / f"{trained(each, 1, learn=True).payload.root}.safetensors" for each in (one, two)}
    return one, two, files


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("method", ["dimat", "average"])
def test_adopting_takes_the_weights_of_the_basis(tmp_path: Path, method: str) -> None:
    """After the merge with the peer they are the peer's, with or without alignment; the metrics of before are own."""
    one, two, files = started(tmp_path, "adopt", merge__method=method)
    own = two.evaluate()
    assert two.adopt_basis(1, one.name, files[one.name]) is not None
    result = merged(two, 1, 0.5, [(one.name, files[one.name], 0.5, True)], "all")
    for name, tensor in one.trainer.weights().items():
        torch.testing.assert_close(two.trainer.weights()[name], tensor)
    assert result.before == own
    assert result.after == pytest.approx(one.evaluate())
    assert any("adopted the weights of" in note for note in result.notes)
    moments, taken = (each.trainer.moments() for each in (two, one))
    assert not moments.keys() ^ (taken.keys() if method == "dimat" else set()), "the optimizer knows nothing of before"
    for name, moment in moments.items():  # where moments travel, it goes on with the peer's, as they came
        torch.testing.assert_close(moment, taken[name], rtol=0.05, atol=float(taken[name].abs().max()) / 100)
    trained(two, 2, learn=True)
    later = merged(two, 2, 0.5, [(one.name, files[one.name], 0.5, True)], "none")
    assert not any("adopted the weights of" in note for note in later.notes)


def test_peers_in_another_basis_are_left_out(tmp_path: Path) -> None:
    """The founder keeps its weights bit for bit: the others come to it."""
    one, two, files = started(tmp_path, "adopt")
    before = one.trainer.weights()
    result = merged(one, 1, 0.5, [(two.name, files[two.name], 0.5, False)], "all")
    assert equal(one.trainer.weights(), before)
    assert result.refused == {}
    assert any(f"not merged, because they have another basis: {two.name}" in note for note in result.notes)


def test_distillation_is_by_the_old_models(tmp_path: Path) -> None:
    """Reference: the peer's weights, then `Trainer.distil` with own old weights and the peers', by hand."""
    (tmp_path / "again").mkdir()
    one, two, files = started(tmp_path, "adopt-distil", merge__method="average")
    _, hand, _ = started(tmp_path / "again", "adopt-distil", merge__method="average")
    assert equal(hand.trainer.weights(), two.trainer.weights())
    two.adopt_basis(1, one.name, files[one.name])
    result = merged(two, 1, 0.5, [(one.name, files[one.name], 0.5, True)], "all")
    former = hand.trainer.weights()
    hand.trainer.start_from(one.trainer.weights())
    hand.trainer.distil(1, [former, one.trainer.weights()], DistilConfig(steps=5, weight=0.6))
    for name, tensor in hand.trainer.weights().items():
        torch.testing.assert_close(two.trainer.weights()[name], tensor)
    assert any("learned for 5 steps" in note and "2 models" in note for note in result.notes)
    assert "train" in result.cpu_s
    # the founder, which takes nothing over, learns from those whom it leaves out
    before = one.trainer.weights()
    result = merged(one, 1, 0.5, [(two.name, files[two.name], 0.5, False)], "all")
    assert any("learned for 5 steps" in note for note in result.notes)
    assert not equal(one.trainer.weights(), before)
    # and once all share a basis a merge is a merge
    settled = two.trainer.weights()
    result = merged(two, 2, 1.0, [], "none")
    assert result.notes == ()
    assert equal(two.trainer.weights(), settled)


def test_a_bad_teacher_or_founder_is_refused(tmp_path: Path) -> None:
    """A NaN in a peer's weights: its basis is not taken over, and it teaches nothing."""
    one, two, _ = started(tmp_path, "adopt-distil")
    bad = one.trainer.weights()
    next(tensor for tensor in bad.values() if tensor.is_floating_point()).fill_(float("nan"))
    save_file(bad, tmp_path / "bad.safetensors")
    before = two.trainer.weights()
    assert two.adopt_basis(1, "eve", tmp_path / "bad.safetensors") is None
    result: MergeResult = merged(two, 1, 0.5, [("eve", tmp_path / "bad.safetensors", 0.5, False)], "all")
    assert "not finite" in result.refused["eve"] or "NaN" in result.refused["eve"]
    assert equal(two.trainer.weights(), before)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    """Aligning at every merge has no one basis; tasks without logits have nothing to teach by."""
    with pytest.raises(ConfigError, match=r'first_merge = "adopt" gives all agents one basis.*align_to = "shared"'):
        tiny_experiment(tmp_path, merge__method="dimat-paper", schedule=schedule("adopt"))
    tiny_experiment(tmp_path, merge__method="dimat-paper")
    with pytest.raises(ConfigError, match=r"did you mean 'distil'"):
        tiny_experiment(tmp_path, schedule={"distill": {"steps": 3}})


def test_later_bases_are_taken_over_by_alignment(tmp_path: Path) -> None:
    """Beyond `first_merge_rounds`: units are permuted, what the network computes stays, and nobody is left out."""
    one, two, files = started(tmp_path, "adopt-distil")
    late = two.config.schedule.first_merge_rounds + 1
    before = two.evaluate()
    moves = two.adopt_basis(late, one.name, files[one.name])
    assert moves is not None
    assert moves.share > 0
    assert two.evaluate() == pytest.approx(before, rel=1e-5)
    result = merged(two, late, 0.5, [(one.name, files[one.name], 0.5, False)], "none")
    assert not any("learned" in note or "not merged" in note for note in result.notes)
    assert one.name in result.moved


@pytest.mark.live
@pytest.mark.parametrize(("first_merge", "method"), [("adopt", "average"), ("adopt-distil", "dimat")])
def test_runs_are_bit_equal_for_any_number_of_workers(tmp_path: Path, first_merge: str, method: str) -> None:
    """And all agents come to the founder's basis as by alignment; who took weights over says so in its record."""
    outcomes = []
    for workers in (1, 2):
        changes: dict[str, Any] = {"schedule": schedule(first_merge), "merge__method": method}
        config = tiny_experiment(tmp_path, simulate__workers=workers, **changes)
        outcomes.append(run(config, tmp_path / str(workers)))
    (results, heard, weights), (again, _, others) = outcomes
    assert same(weights, others)
    assert results.rows == again.rows
    assert len({row.basis for row in results.rows if row.round == 2}) == 1
    for fact in heard:
        if isinstance(fact, events.Merged):
            own, *parts = fact.contributions
            assert own.agent == fact.agent
            assert sum(part.weight for part in fact.contributions) == pytest.approx(1)
            assert all(part.verdict in ("own", "same basis", "adopted") for part in fact.contributions)
            taken = [part for part in parts if part.verdict == "adopted"]
            assert (own.weight == 0) == bool(taken)
    first = {e.agent: e.contributions for e in heard if isinstance(e, events.Merged) and e.round == 1}
    assert [part.verdict for part in first["agent-0"]] == ["own"]
    # agent-1 takes over agent-0's weights, and merges nobody in another basis
    assert [(p.agent, p.verdict, p.weight) for p in first["agent-1"][1:]] == [("agent-0", "adopted", 1.0)]
