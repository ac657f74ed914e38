"""Statistics by class of agents in a network: told, moved with a basis, refused, merged; in the simulator too.

References: the functions of `dimat.merge` called by hand, and the same run in other numbers of processes.
"""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dimat.agent.learner.learner import Learner
from dimat.agent.learner.statistics import sample_statistics
from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.state import MachineState
from dimat.config import MergeConfig
from dimat.errors import ConfigError
from dimat.merge import merge_weights, plan_merge
from dimat.merge.models.classifier import class_counts_of, class_statistics
from dimat.merge.shared_statistics import beside
from dimat.seeds import torch_generator
from dimat.simulate import run_simulation
from dimat.symmetry import permute_weights, random_permutations
from tests.agent.learner.rounds import merged, trained
from tests.agent.learner.test_learner import agents
from tests.agent.learner.test_statistics import assert_refused_and_left_out, snapshot_of
from tests.merge.methods import assert_same_bits, worst
from tests.simulate.helpers import tiny_experiment

STATE = MachineState("tiny", "agent-0", 1, "trained", BasisId(0, "agent-0", "0"))
PULL = {"pull": 100}  # so strong that no fit comes to where its size is bounded, which goes by more than is handed in
WAYS: dict[str, dict[str, Any]] = {
    "head": {"repair": {"name": "head", "options": PULL}},
    "low-rank": {"repair": {"name": "head", "options": {"covariance": "low-rank", "rank": 2, **PULL}}},
    "rows": {"head": "rows"},
    "both": {"repair": "head", "head": "rows", "combine": "fisher"},
}
SKEWED = {"hook": "tiny_task.py:task", "partition": {"kind": "classes", "classes_per_agent": 2}}


def pair(tmp_path: Path, way: str, **merge: Any) -> tuple[Learner, Learner]:
    one, two = agents(tmp_path, merge={"method": "average", **WAYS[way], **merge}, task=SKEWED)
    for agent in (one, two):
        trained(agent, 1, learn=True)
    return one, two


def by_hand(agent: Learner, way: str) -> dict[str, Tensor]:
    inputs, targets = agent.task.data("train").batch(agent.indices)
    data = [(inputs, targets)]
    if way == "rows":
        return class_counts_of(agent.trainer.model, data)
    if way == "low-rank":
        return class_statistics(agent.trainer.model, data, covariance="low-rank", rank=2)
    return class_statistics(agent.trainer.model, data)


@pytest.mark.parametrize("way", ["head", "low-rank", "rows"])
def test_a_merge_of_snapshots_is_the_merge_by_hand(tmp_path: Path, way: str) -> None:
    """Reference: `merge_weights` with statistics handed in, and the generator of the learner's merges. A snapshot holds
    weights and statistics, and nothing more."""
    one, two = pair(tmp_path, way)
    theirs = snapshot_of(two)
    snapshot_of(one)
    held, taken = load_file(theirs), by_hand(two, way)
    assert held.keys() == two.trainer.weights().keys() | {f"aux.{name}" for name in taken}
    for name, tensor in taken.items():
        if not name.startswith("class_factor."):  # whose rows have no sign
            torch.testing.assert_close(held[f"aux.{name}"], tensor, rtol=1e-4, atol=1e-5)
    weights = [agent.trainer.weights() for agent in (one, two)]
    mine = one.checkpoint(STATE).statistics
    expected = merge_weights(
        *(weights[0], weights[1:], [0.7, 0.3], "average"),
        **WAYS[way],
        model=one.trainer.model,
        aux=[dict(mine), {name.removeprefix("aux."): t for name, t in held.items() if name.startswith("aux.")}],
        generator=torch_generator(one.config.seed, "merge", one.name, 1),
    )
    mean = merge_weights(*weights[:1], weights[1:], [0.7, 0.3], "average")
    report = merged(one, 1, 0.7, [("two", theirs, 0.3, True)], "none")
    assert report.refused == {}
    assert worst(one.trainer.weights(), expected) < 1e-5
    changed = {name for name, tensor in one.trainer.weights().items() if not torch.allclose(tensor, mean[name])}
    assert changed == {"5.weight", "5.bias"}


@pytest.mark.parametrize("way", ["head", "low-rank"])
def test_statistics_move_with_weights_into_another_basis(tmp_path: Path, way: str) -> None:
    """Planted permutation: own statistics when own weights adopt a basis, a peer's when it is aligned for a merge. A
    merge with a permuted copy is that with the copy as it was."""
    one, two = pair(tmp_path, way, align="activations", align_to="self")
    assert one.spec is not None
    own, other = one.trainer.weights(), snapshot_of(two)
    moves = random_permutations(one.spec, torch.Generator().manual_seed(5))
    one.trainer.load_weights(permute_weights(own, one.spec, moves))
    permuted_copy = snapshot_of(one)
    moved = dict(one.checkpoint(STATE).statistics)
    results: list[dict[str, Tensor]] = []
    one.trainer.load_weights(own)
    plain_copy = snapshot_of(one)
    for copy in (plain_copy, permuted_copy):
        one.trainer.load_weights(own)
        snapshot_of(one)
        report = merged(one, 1, 0.4, [("copy", copy, 0.3, copy is plain_copy), ("two", other, 0.3, True)], "none")
        assert report.refused == {}
        results.append(one.trainer.weights())
    assert worst(*results) < 1e-4
    one.trainer.load_weights(own)
    snapshot_of(one)
    still = dict(one.checkpoint(STATE).statistics)
    assert worst(still, moved) > 1e-2
    assert one.adopt_basis(1, "copy", permuted_copy)
    for name, tensor in one.checkpoint(STATE).statistics.items():
        square = name.startswith("class_factor.")
        pairs = ((t.mT @ t if square else t) for t in (tensor, moved[name]))
        torch.testing.assert_close(*pairs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("none", "eve: sent no statistics"),
        ("one less", r"eve: statistic 'class_count.5.weight' is missing"),
        ("one more", r"eve: statistic 'class_mean.0.weight' is not one of this agent's"),
        ("wide", r"eve: statistic 'class_mean.5.weight' is \[4, 100000\], expected \[4, 8\]"),
        ("nan", r"eve: statistic 'class_mean.5.weight' holds values that are not finite"),
        ("negative", r"eve: statistic 'class_variance.5.weight' holds variances below 0"),
        ("crowd", r"eve: statistic 'class_count.5.weight' holds counts that are not whole, negative or above 256"),
        ("huge", r"eve: statistic 'class_mean.5.weight' has features .* times as large as the agent's own"),
    ],
)
def test_a_peer_whose_statistics_cannot_be_right_is_refused(tmp_path: Path, fault: str, said: str) -> None:
    """Bad input: its mass goes to self, and the other peer is merged as if it were the only one."""
    one, two = pair(tmp_path, "head")
    good = snapshot_of(two)
    bad = load_file(good)
    count, mean, variance = (f"aux.class_{kind}.5.weight" for kind in ("count", "mean", "variance"))
    match fault:
        case "none":
            bad = {name: tensor for name, tensor in bad.items() if not name.startswith("aux.")}
        case "one less":
            del bad[count]
        case "one more":
            bad["aux.class_mean.0.weight"] = torch.ones(12, 6)
        case "wide":
            bad[mean] = torch.ones(4, 100_000)
        case "nan":
            bad[mean][0, 0] = torch.nan
        case "negative":
            bad[variance] -= 1
        case "crowd":
            bad[count] += 2**40
        case _:
            bad[mean] += 1e6
    save_file(bad, tmp_path / "bad.safetensors")
    assert_refused_and_left_out(one, tmp_path / "bad.safetensors", good, said)


def test_an_agent_goes_on_from_a_checkpoint_with_its_statistics(tmp_path: Path) -> None:
    """What it told before it stopped is what it merges with afterwards: the same weights, bit for bit."""
    one, two = pair(tmp_path, "both")
    theirs = snapshot_of(two)
    snapshot_of(one)
    written = deepcopy(one.checkpoint(STATE))
    assert {name.partition(".")[0] for name in written.statistics} == {
        *("fisher", "class_count", "class_mean", "class_variance")
    }
    merged(one, 1, 0.6, [("two", theirs, 0.4, True)], "none")
    again = Learner(one.name, one.config, one.task, one.indices, one.store, one.spec, durable=False)
    assert again.restore(written) == ""
    merged(again, 1, 0.6, [("two", theirs, 0.4, True)], "none")
    assert_same_bits(again.trainer.weights(), one.trainer.weights())


@pytest.mark.live
@pytest.mark.parametrize("way", WAYS)
def test_workers_change_no_bit(tmp_path: Path, way: str) -> None:
    """The same run in this process and in two: rows of the results, and final weights, with several mixing steps."""
    ends: list[tuple[Any, dict[str, dict[str, Tensor]]]] = []
    for workers in (1, 2):
        config = tiny_experiment(
            *(tmp_path,),
            merge={"method": "dimat", **WAYS[way]},
            task=SKEWED,
            schedule={"rounds": 2, "mixing_steps": 2},
            train__initialisation="shared",
            simulate={"workers": workers},
        )
        results = run_simulation(config, out=tmp_path / str(workers))
        assert results.status == "done"
        finals = (tmp_path / str(workers) / "final").glob("*.safetensors")
        ends.append(([row.model_dump() for row in results.rows], {file.stem: load_file(file) for file in finals}))
    assert ends[0][0] == ends[1][0]
    assert ends[0][1].keys() == ends[1][1].keys() == {"agent-0", "agent-1", "agent-2"}
    for name, weights in ends[0][1].items():
        assert_same_bits(weights, ends[1][1][name])


@pytest.mark.parametrize(
    ("merge", "asked_by"), [({"repair": "head"}, "merge.repair = 'head'"), ({"head": "rows"}, 'merge.head = "rows"')]
)
def test_a_model_without_a_head_is_told_before_anything_is_trained(
    tmp_path: Path, merge: dict[str, Any], asked_by: str
) -> None:
    """Bad input: the setting that asks, the task, and what is missing, in one line."""
    one, _ = agents(tmp_path)
    plan = plan_merge(MergeConfig.model_validate({"method": "average", **merge}))
    assert sample_statistics(plan, one.task, one.trainer.model).keys() >= {"class_count.5.weight"}
    bare = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 4), torch.nn.LogSoftmax(1))
    with pytest.raises(ConfigError, match=f"^{re.escape(asked_by)} and task tiny: .* one nn.Linear") as caught:
        sample_statistics(plan, one.task, bare)
    assert "\n" not in str(caught.value)


def test_beside_names_no_tensor_twice(tmp_path: Path) -> None:
    """Counts that both the repair and the rows ask for travel once."""
    one, _ = pair(tmp_path, "both")
    taken = one.checkpoint(STATE).statistics
    assert sum(name.startswith("class_count.") for name in taken) == 1
    assert beside(one.trainer.weights(), taken).keys() == load_file(snapshot_of(one)).keys()
