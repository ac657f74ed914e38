"""What one agent does with its own machine and its peers' files. References: exact formulas, real damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dimat.agent.learner.checkpoint import Stored, read_state, write_state
from dimat.agent.learner.learner import Learner
from dimat.agent.setup.loaded_task import derive_checked
from dimat.errors import DataError
from dimat.merge.matching.assignment import moved_share
from dimat.simulate.world.scenario import prepare
from tests.agent.learner.rounds import merged, trained
from tests.simulate.helpers import tiny_experiment


def agents(tmp_path: Path, **changes: object) -> tuple[Learner, Learner]:
    config = tiny_experiment(tmp_path, **changes)
    scenario = prepare(config)
    spec = derive_checked(scenario.task)
    assert spec.warnings == ()
    store = tmp_path / "store"
    store.mkdir()
    one, two = (
        Learner(name, config, scenario.task, part, store, spec, durable=False)
        for name, part in zip(scenario.agents[:2], scenario.parts[:2], strict=True)
    )
    return one, two


def shares_moved(permutations: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return by group the share of units that are not where they were, counted one by one."""
    shares: dict[str, float] = {}
    for group, permutation in permutations.items():
        rows = permutation.reshape(-1, permutation.shape[-1]).tolist()
        away = [old != new for row in rows for new, old in enumerate(row)]
        shares[group] = sum(away) / len(away)
    return shares


def test_merge_with_nobody_keeps_own_weights_bit_for_bit(tmp_path: Path) -> None:
    """Exactness rule: weight 1 on self returns own weights bit for bit, and nothing else changes either."""
    one, _ = agents(tmp_path)
    trained(one, 1, learn=True)
    before, state = one.trainer.weights(), one.trainer.state()
    report = merged(one, 1, 1.0, [], "all")
    assert report.before == report.after
    assert all(torch.equal(v, before[k]) for k, v in one.trainer.weights().items())
    assert all(torch.equal(v, state.tensors[k]) for k, v in one.trainer.state().tensors.items())


def test_a_peer_with_nan_is_refused_and_named(tmp_path: Path) -> None:
    """Bad input: a NaN in a peer's weights; its mass goes to self, the other peer is merged, own weights live."""
    one, two = agents(tmp_path, merge__method="average")
    good = trained(two, 1, learn=True).payload
    own = trained(one, 1, learn=True).payload
    bad = two.trainer.weights()
    name = next(k for k in bad if k.endswith("bias"))
    bad[name][3] = float("nan")
    save_file(bad, tmp_path / "bad.safetensors")
    parts = [
        ("eve", tmp_path / "bad.safetensors", 0.4, True),
        ("two", one.store / f"{good.root}.safetensors", 0.4, True),
    ]
    expected = {k: 0.6 * v + 0.4 * two.trainer.weights()[k] for k, v in one.trainer.weights().items()}
    report = merged(one, 1, 0.2, parts, "none")
    assert set(report.refused) == {"eve"}
    assert name in report.refused["eve"]
    for key, tensor in one.trainer.weights().items():
        torch.testing.assert_close(tensor, expected[key])
    assert own.root != good.root


def test_a_peer_with_a_negative_variance_is_refused(tmp_path: Path) -> None:
    """The half of it would be NaN for the whole network under `average`."""
    one, two = agents(tmp_path, merge__method="average", task={"name": "digits"})
    before, bad = one.trainer.weights(), two.trainer.weights()
    bad["bn1.running_var"].neg_()
    save_file(bad, tmp_path / "bad.safetensors")
    report = merged(one, 1, 0.5, [("two", tmp_path / "bad.safetensors", 0.5, True)], "all")
    assert "'bn1.running_var' is a variance and holds" in report.refused["two"]
    assert report.after == report.before
    assert all(torch.equal(v, before[k]) for k, v in one.trainer.weights().items())


def test_a_peer_with_nan_cannot_be_aligned_to(tmp_path: Path) -> None:
    """Bad input, for basis gossip: nothing is adopted and nothing changes; the merge then refuses the peer."""
    one, two = agents(tmp_path)
    trained(one, 1, learn=True)
    before = one.trainer.weights()
    bad = {k: torch.full_like(v, float("nan")) for k, v in two.trainer.weights().items()}
    save_file(bad, tmp_path / "bad.safetensors")
    assert one.adopt_basis(1, "eve", tmp_path / "bad.safetensors") is None
    report = merged(one, 1, 0.5, [("eve", tmp_path / "bad.safetensors", 0.5, False)], "none")
    assert set(report.refused) == {"eve"}
    assert all(torch.equal(v, before[k]) for k, v in one.trainer.weights().items())


def test_adopting_a_permuted_copys_basis_gives_that_copy(tmp_path: Path) -> None:
    """Planted permutation: an agent aligned to a permuted copy of itself becomes that copy; outputs stay."""
    from dimat.symmetry import permute_weights, random_permutations

    one, _ = agents(tmp_path)
    trained(one, 1, learn=True)
    assert one.spec is not None
    planted = random_permutations(one.spec, torch.Generator().manual_seed(5))
    copy = permute_weights(one.trainer.weights(), one.spec, planted)
    save_file({k: v.contiguous() for k, v in copy.items()}, tmp_path / "copy.safetensors")
    metrics = one.evaluate()
    moves = one.adopt_basis(1, "copy", tmp_path / "copy.safetensors")
    assert moves is not None
    assert moves.share == pytest.approx(moved_share(planted))
    assert moves.groups == pytest.approx(shares_moved(planted))
    for key, tensor in one.trainer.weights().items():
        torch.testing.assert_close(tensor, copy[key])
    assert one.evaluate() == pytest.approx(metrics, abs=1e-6)


@pytest.mark.parametrize("optimizer", ["Adafactor", "NAdam", "Rprop", "SGD"])
def test_training_goes_on_after_a_change_of_basis_as_if_there_had_been_none(tmp_path: Path, optimizer: str) -> None:
    """Reference: the same agent in its old basis, permuted at the end. State of rows and columns moves with the units,
    and nothing of it is reset."""
    from dimat.symmetry import permute_weights, random_permutations

    settings = {"name": f"torch.optim.{optimizer}", "options": {"momentum": 0.9} if optimizer == "SGD" else {}}
    train = {"epochs_per_round": 2, "batch_size": 16, "optimizer": settings, "optimizer_state": "kept"}
    for name in ("one", "twin"):
        (tmp_path / name).mkdir()
    one, twin = (agents(tmp_path / name, train=train)[0] for name in ("one", "twin"))
    trained(one, 1, learn=True)
    trained(twin, 1, learn=True)
    assert one.spec is not None
    planted = random_permutations(one.spec, torch.Generator().manual_seed(5))
    copy = permute_weights(one.trainer.weights(), one.spec, planted)
    save_file({k: v.contiguous() for k, v in copy.items()}, tmp_path / "copy.safetensors")
    moves = one.adopt_basis(1, "copy", tmp_path / "copy.safetensors")
    assert moves is not None
    assert moves.share == pytest.approx(moved_share(planted))
    assert "reset" not in moves.note
    for agent in (one, twin):
        agent.train(2, learn=True)
    expected = permute_weights(twin.trainer.weights(), one.spec, planted)
    for key, tensor in one.trainer.weights().items():
        torch.testing.assert_close(tensor, expected[key], rtol=2e-3, atol=2e-4)


def test_a_merge_tells_how_many_units_of_a_peer_moved(tmp_path: Path) -> None:
    """Planted permutation: a permuted copy of itself is brought back, and its planted share is what moved; of a peer
    in the same basis nothing is told, nor by a method that does not align."""
    from dimat.symmetry import permute_weights, random_permutations

    for method, told in (("dimat", True), ("average", False)):
        (tmp_path / method).mkdir()
        one, _ = agents(tmp_path / method, merge={"method": method, "combine": "average"})
        trained(one, 1, learn=True)
        assert one.spec is not None
        planted = random_permutations(one.spec, torch.Generator().manual_seed(5))
        copy = permute_weights(one.trainer.weights(), one.spec, planted)
        save_file({k: v.contiguous() for k, v in copy.items()}, tmp_path / "copy.safetensors")
        save_file(one.trainer.weights(), tmp_path / "same.safetensors")
        parts = [
            ("copy", tmp_path / "copy.safetensors", 0.25, False),
            ("same", tmp_path / "same.safetensors", 0.25, True),
        ]
        done = merged(one, 1, 0.5, parts, "none")
        assert done.moved == ({"copy": pytest.approx(moved_share(planted))} if told else {})
        assert done.moved_groups == ({"copy": pytest.approx(shares_moved(planted))} if told else {})


def test_checkpoint_holds_a_trainer(tmp_path: Path) -> None:
    """Train 2 rounds = train 1, checkpoint file, new agent, train 1: bit for bit, through the file."""
    from dimat.train.base import TrainerState

    one, _ = agents(tmp_path)
    trained(one, 1, learn=True)
    state = one.trainer.state()
    write_state(tmp_path / "c", Stored(state.tensors, state.values))
    trained(one, 2, learn=True)
    kept = read_state(tmp_path / "c")
    again = Learner("agent-0", one.config, one.task, one.indices, one.store, one.spec, durable=False)
    again.trainer.load_state(TrainerState(dict(kept.tensors), dict(kept.values)))
    trained(again, 2, learn=True)
    ours, theirs = one.trainer.state(), again.trainer.state()
    assert ours.values == theirs.values
    assert all(torch.equal(v, theirs.tensors[k]) for k, v in ours.tensors.items())


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    """Missing, cut and foreign files: DataError with the path."""
    file = tmp_path / "c"
    with pytest.raises(DataError, match="cannot read checkpoint"):
        read_state(file)
    write_state(file, Stored({"t": torch.ones(3)}, {"x": 1}))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="cannot read checkpoint"):
        read_state(file)
    save_file({"t": torch.ones(3)}, file)
    with pytest.raises(DataError, match="not a checkpoint that this dimat reads"):
        read_state(file)
