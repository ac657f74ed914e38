"""Statistics that travel with weights: taken after training, recorded, checked, moved with a basis, merged.

References: `merge_weights` with statistics handed in, and statistics of the same weights taken anew.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dimat.agent.learner.learner import Learner
from dimat.agent.learner.statistics import take_statistics
from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.state import MachineState
from dimat.errors import MergeError
from dimat.merge import merge_weights, plan_merge
from dimat.merge.models.fisher_information import empirical_fisher
from dimat.merge.models.gram import gram_matrices
from dimat.merge.shared_statistics import apart, beside
from dimat.symmetry import permute_weights, random_permutations
from dimat.tasks.base import Batch
from dimat.weights.tensors import schema_hash
from tests.agent.learner.rounds import merged, trained
from tests.agent.learner.test_learner import agents
from tests.merge.methods import assert_same_bits, worst
from tests.simulate.helpers import tiny_experiment

STATE = MachineState("tiny", "agent-0", 1, "trained", BasisId(0, "agent-0", "0"))
METHODS = {"fisher": "fisher.", "regmean": "gram."}


def pair(tmp_path: Path, method: str, **merge: Any) -> tuple[Learner, Learner]:
    """Two agents that have trained, and merge by this method."""
    one, two = agents(tmp_path, merge={"method": "average", "combine": method, **merge})
    for agent in (one, two):
        trained(agent, 1, learn=True)
    return one, two


def snapshot_of(agent: Learner) -> Path:
    """Record the agent's weights as they are, as a round without training does."""
    return agent.store / f"{trained(agent, 1, learn=False).payload.root}.safetensors"


def assert_refused_and_left_out(one: Learner, bad: Path, good: Path, said: str) -> None:
    """Merge "eve"'s bad snapshot and "two"'s good one: the former is refused in one line, and the latter is merged as
    if it were the only one."""
    own = one.trainer.weights()
    snapshot_of(one)
    report = merged(one, 1, 0.5, [("eve", bad, 0.3, True), ("two", good, 0.2, True)], "none")
    assert set(report.refused) == {"eve"}
    assert re.match(said, report.refused["eve"])
    assert "\n" not in report.refused["eve"]
    found = one.trainer.weights()
    one.trainer.load_weights(own)
    snapshot_of(one)
    merged(one, 1, 0.8, [("two", good, 0.2, True)], "none")
    assert_same_bits(found, one.trainer.weights())


def by_hand(agent: Learner) -> dict[str, Tensor]:
    """Both kinds of statistics of the agent's weights, on all of its data."""
    inputs, targets = agent.task.data("train").batch(agent.indices)
    model = agent.trainer.model
    return {**empirical_fisher(model, [(inputs, targets)]), **gram_matrices(model, [inputs])}


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_of_snapshots_is_the_merge_of_weights_and_statistics(tmp_path: Path, method: str) -> None:
    """Reference: `merge_weights`, with statistics of all of each agent's data. Snapshots hold those, and nothing more;
    the schema is that of the weights."""
    one, two = pair(tmp_path, method)
    mine, theirs = snapshot_of(one), snapshot_of(two)
    held = load_file(theirs)
    prefix = METHODS[method]
    taken = {name: tensor for name, tensor in by_hand(two).items() if name.startswith(prefix)}
    assert held.keys() == two.trainer.weights().keys() | {f"aux.{name}" for name in taken}
    for name, tensor in taken.items():
        torch.testing.assert_close(held[f"aux.{name}"], tensor, rtol=1e-4, atol=1e-7)
    assert trained(two, 1, learn=False).schema == schema_hash(two.trainer.weights()) == two.schema()

    weights = [agent.trainer.weights() for agent in (one, two)]
    expected = merge_weights(
        weights[0], weights[1:], [0.7, 0.3], "average", combine=method, aux=[by_hand(one), by_hand(two)]
    )
    mean = merge_weights(weights[0], weights[1:], [0.7, 0.3], "average")
    report = merged(one, 1, 0.7, [("two", theirs, 0.3, True)], "none")
    assert report.refused == {}
    assert worst(one.trainer.weights(), expected) < 1e-4
    assert worst(one.trainer.weights(), mean) > 0.01
    assert mine.exists()


@pytest.mark.parametrize("method", METHODS)
def test_own_statistics_move_with_the_basis_that_is_adopted(tmp_path: Path, method: str) -> None:
    """Planted permutation: an agent that adopts the basis of a permuted copy of itself, and then merges that copy with
    the copy's statistics, is that copy. With statistics left in the old basis it would not be."""
    one, _ = pair(tmp_path, method, align="activations")
    assert one.spec is not None
    planted = random_permutations(one.spec, torch.Generator().manual_seed(5))
    copy = permute_weights(one.trainer.weights(), one.spec, planted)
    taken = take_statistics(
        plan_merge(one.config.merge),
        one.task,
        one.trainer.model,
        one.trainer.data,
        512,
        torch.Generator().manual_seed(0),
    )
    start = one.trainer.weights()
    one.trainer.load_weights(copy)
    moved = {name: t for name, t in by_hand(one).items() if name.startswith(METHODS[method])}
    one.trainer.load_weights(start)
    assert any(not torch.allclose(moved[name], tensor) for name, tensor in taken.items())

    save_file({k: v.contiguous() for k, v in beside(copy, moved).items()}, tmp_path / "copy.safetensors")
    assert one.adopt_basis(1, "copy", tmp_path / "copy.safetensors")
    for name, tensor in one.checkpoint(STATE).statistics.items():
        torch.testing.assert_close(tensor, moved[name], rtol=1e-4, atol=1e-7)
    report = merged(one, 1, 0.5, [("copy", tmp_path / "copy.safetensors", 0.5, True)], "none")
    assert report.refused == {}
    assert worst(one.trainer.weights(), copy) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_peer_in_another_basis_is_permuted_with_its_statistics(tmp_path: Path, method: str) -> None:
    """A permuted copy of own, statistics and all, aligned for this merge: the merge returns own."""
    one, _ = pair(tmp_path, method, align="activations", align_to="self")
    assert one.spec is not None
    own = one.trainer.weights()
    copy = permute_weights(own, one.spec, random_permutations(one.spec, torch.Generator().manual_seed(5)))
    one.trainer.load_weights(copy)
    theirs = snapshot_of(one)
    one.trainer.load_weights(own)
    snapshot_of(one)
    report = merged(one, 1, 0.5, [("copy", theirs, 0.5, False)], "none")
    assert report.refused == {}
    assert worst(one.trainer.weights(), own) < 1e-5


def damaged(held: dict[str, Tensor], fault: str) -> dict[str, Tensor]:
    key = next(name for name in held if name.startswith("aux."))
    match fault:
        case "none":
            return {name: tensor for name, tensor in held.items() if not name.startswith("aux.")}
        case "one less":
            return {name: tensor for name, tensor in held.items() if name != key}
        case "one more":
            return {**held, "aux.fisher.extra": torch.ones(2)}
        case "of another kind":
            return {**held, "aux.weights": torch.ones(2)}
        case "no statistic":
            return {**held, "extra": torch.ones(2)}
        case "shape":
            return {**held, key: torch.ones(2, 3, 4)}
        case "type":
            return {**held, key: torch.ones_like(held[key], dtype=torch.int64)}
        case "float8":
            return {**held, key: held[key].to(torch.float8_e4m3fn)}
        case _:
            return {**held, key: torch.full_like(held[key], {"nan": torch.nan, "inf": torch.inf}.get(fault, -1.0))}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("none", "eve: sent no statistics"),
        ("one less", "eve: statistic '.*' is missing"),
        ("one more", "eve: statistic 'fisher.extra' is not one of this agent's"),
        ("of another kind", "eve: statistic 'weights' is not one of this agent's"),
        ("no statistic", "eve: tensor 'extra' is not in our model"),
        ("shape", r"eve: statistic '.*' is \[2, 3, 4\], expected"),
        ("type", "eve: statistic '.*' holds values that are negative or not finite"),
        ("float8", "eve: statistic '.*' holds values that are negative or not finite"),
        ("nan", "eve: statistic '.*' holds values that are negative or not finite"),
        ("inf", "eve: statistic '.*' holds values that are negative or not finite"),
        ("negative", "eve: statistic '.*' holds values that are negative or not finite"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_peer_whose_statistics_cannot_be_right_is_refused(tmp_path: Path, method: str, fault: str, said: str) -> None:
    """Bad input: its mass goes to self; the other peer is merged as if it were the only one."""
    one, two = pair(tmp_path, method)
    good = snapshot_of(two)
    save_file(damaged(load_file(good), fault), tmp_path / "bad.safetensors")
    own = one.trainer.weights()
    assert_refused_and_left_out(one, tmp_path / "bad.safetensors", good, said)
    one.trainer.load_weights(own)
    snapshot_of(one)
    alone = merged(one, 1, 0.5, [("eve", tmp_path / "bad.safetensors", 0.5, True)], "none")
    assert set(alone.refused) == {"eve"}
    assert_same_bits(one.trainer.weights(), own)


def test_who_asks_for_no_statistics_takes_none(tmp_path: Path) -> None:
    """An agent that averages refuses a snapshot with tensors that are not its model's, and names the first."""
    one, two = pair(tmp_path, "fisher")
    theirs = snapshot_of(two)
    config = tiny_experiment(tmp_path, merge__method="average")
    plain = Learner("plain", config, one.task, one.indices, one.store, None, durable=False)
    assert load_file(snapshot_of(plain)).keys() == plain.trainer.weights().keys()
    report = merged(plain, 1, 0.5, [("two", theirs, 0.5, True)], "none")
    assert "tensor 'aux.fisher." in report.refused["two"]


def test_a_newcomer_takes_over_weights_alone(tmp_path: Path) -> None:
    """Statistics are the publisher's, of its data."""
    one, two = pair(tmp_path, "fisher")
    assert one.adopt_weights("two", snapshot_of(two)) == ""
    assert_same_bits(one.trainer.weights(), two.trainer.weights())


class Watched:
    """Data that note which examples are read, and that nothing is drawn."""

    def __init__(self, agent: Learner) -> None:
        self.data = agent.trainer.data
        self.labels = None
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        assert generator is None
        self.read += indices.tolist()
        return self.data.batch(indices)


@pytest.mark.parametrize("method", METHODS)
def test_statistics_rest_on_a_few_examples_drawn_with_the_seed(tmp_path: Path, method: str) -> None:
    """Each example once, no more than asked for; equal draws give equal bits, others do not. The model stays as it is,
    and so does torch's generator."""
    one, _ = pair(tmp_path, method, statistics_samples=10)
    before, global_state = one.trainer.weights(), torch.random.get_rng_state()
    one.trainer.model.train()
    plan = plan_merge(one.config.merge)

    def take(seed: int, data: Any) -> dict[str, Tensor]:
        draws = torch.Generator().manual_seed(seed)
        return take_statistics(plan, one.task, one.trainer.model, data, 4, draws)

    watched = Watched(one)
    first = take(0, watched)
    assert len(set(watched.read)) == len(watched.read) == 10
    assert_same_bits(take(0, Watched(one)), first)
    assert worst(take(1, Watched(one)), first) > 1e-3
    inputs, targets = one.trainer.data.batch(torch.tensor(watched.read))
    expected = (
        empirical_fisher(one.trainer.model, [(inputs, targets)])
        if method == "fisher"
        else gram_matrices(one.trainer.model, [inputs])
    )
    assert first.keys() == expected.keys()
    assert worst(first, expected) < 1e-5
    assert one.trainer.model.training
    assert_same_bits(one.trainer.weights(), before)
    assert torch.equal(torch.random.get_rng_state(), global_state)


def test_a_model_may_have_a_module_called_aux() -> None:
    """Its tensors are weights; only one that is called as a statistic of ours would be is an error."""
    model = nn.ModuleDict({"aux": nn.Linear(2, 2), "fisher": nn.Linear(2, 2)})
    weights = dict(model.state_dict())
    aux = {f"fisher.{name}": torch.ones_like(tensor) for name, tensor in weights.items()}
    found, statistics = apart(beside(weights, aux), weights)
    assert_same_bits(found, weights)
    assert_same_bits(statistics, aux)
    assert len(found) == len(weights)
    with pytest.raises(MergeError, match=r"'aux\.fisher\.x' has the name of a statistic"):
        beside({"aux.fisher.x": torch.ones(1), "x": torch.ones(1)}, {"fisher.x": torch.ones(1)})
