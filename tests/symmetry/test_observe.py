"""Observed activations against plain forward hooks, and against permuted weights."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimat.errors import SymmetryError
from dimat.symmetry import (
    ObservationPoint,
    Observer,
    SymmetrySpec,
    derive_symmetry,
    observation_points,
    permute_weights,
    points_at,
    random_permutations,
    trace,
    verify_symmetry,
)
from tests.symmetry.zoo import SMALL, ResNet20, case, derived, output_node


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_points(name: str) -> dict[str, tuple[ObservationPoint, ...]]:
    return {group.id: group.points for group in derived(name).groups if group.points}


def hooked(model: nn.Module, modules: list[str], inputs: Tensor) -> dict[str, Tensor]:
    """Return what enters each module, copied when it does, as (samples, units)."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0].detach().clone().movedim(1, -1).flatten(0, -2)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in modules]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return seen


# modules whose input the published DIMAT observes: inner convolutions, and the ends of stages
WATCHED = {
    "resnet20-B": [*(f"layer{s}.{b}.conv2" for s in (1, 2, 3) for b in (0, 1, 2)), "layer2.0.shortcut.0"],
    "resnet20-A": [*(f"layer{s}.{b}.conv2" for s in (1, 2, 3) for b in (0, 1, 2))],
    "vgg": ["features.1", "features.2", "features.4", "features.8", "features.11", "classifier.1", "classifier.3"],
    "lenet": ["conv2", "fc2", "fc3"],
}


@pytest.mark.parametrize("name", WATCHED)
def test_matrices_equal_forward_hooks(name: str) -> None:
    """Reference: forward pre-hooks on the module, with a batch size that the trace never saw."""
    model, spec = case(name).model, derived(name)
    inputs = torch.randn(5, *case(name).inputs[0].shape[1:], generator=generator())
    observer = Observer(model, spec, case(name).inputs)
    expected = hooked(model, WATCHED[name], inputs)
    for module, reference in expected.items():
        # before the last layer stands dropout, which does nothing
        found = points_at(spec, [observer.input_node("classifier.2" if module == "classifier.3" else module)])
        assert len(found) == 1, module
        (seen,) = observer.run(model.state_dict(), (inputs,), found).values()
        torch.testing.assert_close(seen[0], reference, rtol=1e-5, atol=1e-6)


def test_stage_ends_are_among_the_points() -> None:
    """Reference: the stream of a stage is matched after its last ReLU, as in the published method."""
    spec = derived("resnet20-B")
    observer = Observer(case("resnet20-B").model, spec, case("resnet20-B").inputs)
    streams = [group for group in spec.groups if ("linear.weight", 1) in group.axes]
    assert streams[0].points[-1].node == "relu_18"
    traced = trace(case("resnet20-B").model, case("resnet20-B").inputs)
    assert output_node(traced, "layer3") == "relu_18"
    for stage, end in (("layer2.0.shortcut.0", "layer1"), ("layer3.0.shortcut.0", "layer2")):
        node = observer.input_node(stage)
        assert node == output_node(traced, end)
        assert len(points_at(spec, [node])) == 1
    assert all(len(group.points) <= 6 for group in spec.groups)
    assert all(group.points[0].pre_activation and not group.points[-1].pre_activation for group in spec.groups)


@pytest.mark.parametrize("name", SMALL)
def test_permuting_weights_permutes_observed_columns(name: str) -> None:
    """Reference: unit j of the permuted network is unit p[j] of the old one, at every point.

    Where units have a permutation of their own for each of their parents', that is unit (p_parent[h], p[h, j]).
    """
    model, spec = case(name).model, derived(name)
    observer = Observer(model, spec, case(name).inputs)
    p = random_permutations(spec, generator(2))
    state = {k: v.double() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    inputs = tuple(x.double() if x.is_floating_point() else x for x in case(name).inputs)
    points = observation_points(model, case(name).inputs)
    assert set(points) == {group.id for group in spec.groups}
    assert all(set(all_points(name).get(group, ())) <= set(listed) for group, listed in points.items())
    before = observer.run(state, inputs, points)
    after = observer.run(permute_weights(state, spec, p), inputs, points)
    for group, matrices in before.items():
        for one, other in zip(matrices, after[group], strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(other, one[:, _columns(spec, group, p)], rtol=1e-5, atol=1e-6)


def _columns(spec: SymmetrySpec, group: str, p: dict[str, Tensor]) -> Tensor:
    parents = spec.group(group).parents
    columns: list[Tensor] = []
    for new in itertools.product(*(range(spec.group(parent).size) for parent in parents)):
        place = 0
        for parent, unit in zip(parents, new):
            above = tuple(new[parents.index(other)] for other in spec.group(parent).parents)
            place = place * spec.group(parent).size + int(p[parent][(*above, unit)])
        columns.append(place * spec.group(group).size + p[group][new])
    return torch.cat(columns)


def test_concatenated_groups_are_observed_in_their_slice() -> None:
    """Reference: zero-padded streams hold three groups side by side on one axis."""
    spec = derived("resnet20-A")
    group = next(group for group in spec.groups if group.id.endswith("+12"))
    assert {(point.start, point.length) for point in group.points} == {(12, 4), (20, 4)}


class Rude(nn.Module):
    """Writes to its input, to a weight's view and to a buffer, in place."""

    counter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 2)
        self.register_buffer("counter", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        x.relu_()
        self.counter.view(5).add_(1.0)
        x = self.one(x) + self.counter
        kept = x.view(-1, 5)
        x.mul_(2.0)
        return self.two(F.relu_(kept))


def test_weights_and_inputs_are_never_written_to() -> None:
    """Reference: the same bytes before and after, twice the same result, and the values of the module itself."""
    model, inputs = Rude().eval(), torch.randn(6, 4)
    spec = derive_symmetry(model, inputs.clone())
    model.counter.zero_()
    points = observation_points(model, inputs.clone())
    observer = Observer(model, spec, inputs.clone())
    model.counter.zero_()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    kept, before = inputs.clone(), copy.deepcopy(weights)
    first = observer.run(weights, (inputs,), points)
    second = observer.run(weights, (inputs,), points)
    assert torch.equal(inputs, kept)
    assert all(torch.equal(weights[key], before[key]) for key in weights)
    assert verify_symmetry(model, spec, inputs, generator()) < 1e-9
    assert torch.equal(inputs, kept)
    (group,) = [group for group in spec.groups if group.size == 5]
    assert all(torch.equal(a, b) for a, b in zip(first[group.id], second[group.id]))
    expected = (model.one(kept.relu()) + 1).detach()
    by_node = {point.node: value for point, value in zip(points[group.id], first[group.id])}
    torch.testing.assert_close(by_node["add"], expected)
    torch.testing.assert_close(by_node["relu_"] if "relu_" in by_node else first[group.id][-1], (2 * expected).relu())


def test_weights_in_one_block_of_memory() -> None:
    """Reference: tensors mapped from one file share their storage; results are as with separate ones."""
    name = "resnet20-B"
    state, spec = case(name).model.state_dict(), derived(name)
    floats = {key: value for key, value in state.items() if value.is_floating_point()}
    block = torch.cat([value.flatten() for value in floats.values()])
    parts = block.split([value.numel() for value in floats.values()])
    mapped = {**state, **{key: part.view(floats[key].shape) for key, part in zip(floats, parts)}}
    observer = Observer(case(name).model, spec, case(name).inputs)
    one = observer.run(state, case(name).inputs, all_points(name))
    other = observer.run(mapped, case(name).inputs, all_points(name))
    assert all(torch.equal(a, b) for group in one for a, b in zip(one[group], other[group]))


def test_run_ends_at_the_last_point_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the classifier's weights are not looked at when only the first layer is observed."""
    name = "vgg"
    spec = derived(name)
    observer = Observer(case(name).model, spec, case(name).inputs)
    group = next(group for group in spec.groups if ("features.0.weight", 0) in group.axes)
    state = {key: value for key, value in case(name).model.state_dict().items() if key.startswith("features.0")}
    seen = observer.run(state, case(name).inputs, {group.id: group.points[:1]})
    assert seen[group.id][0].shape == (2 * 32 * 32, group.size)
    assert observer.run({}, case(name).inputs, {}) == {}


def test_mistakes_are_named() -> None:
    """Reference: another model's spec, an unknown node, a missing tensor, an unknown module."""
    name = "vgg"
    spec, inputs = derived(name), case(name).inputs
    with pytest.raises(SymmetryError, match="derived from another model"):
        Observer(ResNet20(), spec, inputs)
    observer = Observer(case(name).model, spec, inputs)
    group = spec.groups[0]
    lost = ObservationPoint("nowhere", 1, 0, 4, (4,), 0)
    with pytest.raises(SymmetryError, match="no node 'nowhere'"):
        observer.run(case(name).model.state_dict(), inputs, {group.id: [lost]})
    with pytest.raises(SymmetryError, match=r"'features\.0\.weight' is missing"):
        observer.run({}, inputs, {group.id: group.points})
    with pytest.raises(SymmetryError, match="nothing enters a submodule 'head'"):
        observer.input_node("head")
