"""The whole merge against DIMAT's reference program (arXiv 2404.08079), through the automatic spec.

Reference: `tests/golden/dimat_*.safetensors`, outputs of the authors' program on two batches of 64 CIFAR-10
images. Its merge matrices carry a factor n/(n + 1e-5) per node, hence rtol 1e-4 on weights. Where tied scores
leave several best assignments, ours may differ in indices but not in value, and theirs is applied downstream.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dimat import align_weights, derive_symmetry, merge_weights
from dimat.merge.combine.average import average
from dimat.merge.matching.activation_statistics import CrossStatistics
from dimat.merge.matching.assignment import assignment_value
from dimat.merge.repair.batchnorm import batchnorm
from dimat.merge.weight_views import PermutedWeights
from dimat.symmetry import Observer, SymmetrySpec, trace
from tests.merge.networks import ResNet, Vgg
from tests.symmetry.zoo import output_node

GOLDEN = Path(__file__).parent.parent / "golden"
FACTS = json.loads((GOLDEN / "dimat.json").read_text())
RUNS = [(net, run["name"]) for net in ("vggbn", "resnet8") for run in FACTS[net]["runs"]]


@dataclass
class Network:
    model: nn.Module
    spec: SymmetrySpec
    observer: Observer
    tensors: dict[str, Tensor]
    batches: list[Tensor]

    def block(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{prefix}."): v for k, v in self.tensors.items() if k.startswith(f"{prefix}.")}


@cache
def load(net: str) -> Network:
    tensors = load_file(GOLDEN / f"dimat_{net}.safetensors")
    model = Vgg(FACTS[net]["arch"]) if net == "vggbn" else ResNet()
    mean = torch.tensor([0.49140000343322754, 0.4821999967098236, 0.4465000033378601]).view(3, 1, 1)
    std = torch.tensor([0.24699999392032623, 0.2434999942779541, 0.26159998774528503]).view(3, 1, 1)
    images = (load_file(GOLDEN / "images.safetensors")["images_u8"].float() / 255 - mean) / std
    spec = derive_symmetry(model, (images[:2],))
    return Network(model, spec, Observer(model, spec, (images[:2],)), tensors, [images[:64], images[64:]])


def facts(net: str, run: str) -> dict[str, Any]:
    return next(r for r in FACTS[net]["runs"] if r["name"] == run)


def points_of(network: Network, net: str, run: str) -> dict[str, tuple[str, str]]:
    """Return, for each node number of the reference, our group and the graph node where it is observed."""
    found: dict[str, tuple[str, str]] = {}
    for number, node in facts(net, run)["nodes"].items():
        module = node["hook"].removeprefix("input of ")
        if module == "avgpool":  # the reference's module; ours pools by a function after the last block
            at = output_node(trace(network.model, (network.batches[0][:2],)), "layer3.0")
        else:
            at = network.observer.input_node(module)
        (group,) = (g for g in network.spec.groups if any(p.node == at for p in g.points))
        assert group.size == node["C"]
        found[number] = (group.id, at)
    assert len({group for group, _ in found.values()}) == len(network.spec.groups)
    return found


@cache
def correlations(net: str, run: str, peer: int) -> dict[str, Tensor]:
    """Return our correlation blocks over all positions of both batches, by node number of the reference."""
    network = load(net)
    points = points_of(network, net, run)
    chosen = {g: [p for p in network.spec.group(g).points if p.node == node] for g, node in points.values()}
    models = facts(net, run)["models"]
    statistics = {group: CrossStatistics(1) for group in chosen}
    for batch in network.batches:
        own, other = (network.observer.run(network.block(f"in.{models[k]}"), (batch,), chosen) for k in (0, peer))
        for group, point in statistics.items():
            point.update(own[group][0], [other[group][0]])
    return {number: statistics[group].correlation(0) for number, (group, _) in points.items()}


@cache
def reference_permutations(net: str, run: str, peer: int) -> dict[str, Tensor]:
    network = load(net)
    points = points_of(network, net, run)
    return {points[n][0]: network.tensors[f"{run}.perm.{n}.{peer}"].long() for n in points}


def others(run: dict[str, Any]) -> range:
    return range(1, len(run["models"]))


@pytest.mark.parametrize(("net", "run"), RUNS)
def test_correlation_blocks(net: str, run: str) -> None:
    """Reference: `{run}.corr.{node}.{k}` where the file has them, to 1e-4."""
    network = load(net)
    checked = 0
    for peer in others(facts(net, run)):
        for number, ours in correlations(net, run, peer).items():
            name = f"{run}.corr.{number}.{peer}"
            if name in network.tensors:
                torch.testing.assert_close(ours, network.tensors[name].double(), rtol=0, atol=1e-4)
                checked += 1
    assert checked or run == "n2_w73"  # its blocks, equal to n2_equal's, are not in the file


@pytest.mark.parametrize(("net", "run"), RUNS)
def test_assignments_are_worth_what_the_reference_found(net: str, run: str) -> None:
    """Reference: `{run}.perm.*` and `cost_k`. Equal value to 1e-6 under our correlation and under theirs."""
    network = load(net)
    info = facts(net, run)
    points = points_of(network, net, run)
    own = network.block(f"in.{info['models'][0]}")
    for peer in others(info):
        ours = align_weights(
            network.model,
            own,
            network.block(f"in.{info['models'][peer]}"),
            network.spec,
            data=network.batches,
            points={group: [node] for group, node in points.values()},
            positions=None,
            stable_within=None,
        )
        assert ours.keys() == {group.id for group in network.spec.groups}
        theirs = reference_permutations(net, run, peer)
        for number, correlation in correlations(net, run, peer).items():
            group = points[number][0]
            value = assignment_value(correlation, ours[group])
            assert value == pytest.approx(assignment_value(correlation, theirs[group]), rel=1e-6)
            assert value == pytest.approx(info["nodes"][number][f"cost_{peer}"], rel=1e-5)
            block = network.tensors.get(f"{run}.corr.{number}.{peer}")
            if block is not None:
                assert assignment_value(block, ours[group]) == pytest.approx(
                    assignment_value(block, theirs[group]), rel=1e-6
                )


def merged(net: str, run: str) -> dict[str, Tensor]:
    """Average under the reference's permutations."""
    network = load(net)
    info = facts(net, run)
    own, *rest = (network.block(f"in.{k}") for k in info["models"])
    views = [PermutedWeights(peer, network.spec, reference_permutations(net, run, k)) for k, peer in enumerate(rest, 1)]
    return dict(average(own, views, info["weights"]))


def logits(network: Network, weights: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.func.functional_call(network.model.eval(), weights, (network.batches[0][:32],))


@pytest.mark.parametrize(("net", "run"), RUNS)
def test_merged_weights_and_logits(net: str, run: str) -> None:
    """Reference: `{run}.merged.*` (absent for resnet8 n2_equal) and `{run}.logits`, before re-estimation."""
    network = load(net)
    weights = merged(net, run)
    expected = network.block(f"{run}.merged")
    assert expected or (net, run) == ("resnet8", "n2_equal")
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits(network, weights), network.tensors[f"{run}.logits"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("net", "run"), RUNS)
def test_reestimated_batchnorm_and_logits(net: str, run: str) -> None:
    """Reference: `{run}.bnreset.*`, means of the statistics of two batches, and `{run}.logits_bnreset`."""
    network = load(net)
    data = [(batch,) for batch in network.batches]
    repaired = batchnorm(merged(net, run), model=network.model, data=data, estimator="batch-mean").weights
    expected = network.block(f"{run}.bnreset")
    assert expected
    for name, tensor in expected.items():
        torch.testing.assert_close(repaired[name], tensor, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        logits(network, repaired), network.tensors[f"{run}.logits_bnreset"], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(("net", "run"), RUNS)
def test_merge_weights_end_to_end(net: str, run: str) -> None:
    """Reference: `{run}.logits_bnreset` from one call of the public function (no tied scores in these files)."""
    network = load(net)
    info = facts(net, run)
    own, *rest = (network.block(f"in.{k}") for k in info["models"])
    weights = merge_weights(
        own,
        rest,
        info["weights"],
        "dimat-paper",
        model=network.model,
        data=network.batches,
        spec=network.spec,
        points={group: [node] for group, node in points_of(network, net, run).values()},
        align={"name": "activations", "options": {"positions": None, "stable_within": None}},
        repair={"name": "batchnorm", "options": {"estimator": "batch-mean", "stable_within": None}},
    )
    torch.testing.assert_close(logits(network, weights), network.tensors[f"{run}.logits_bnreset"], rtol=1e-3, atol=1e-3)
