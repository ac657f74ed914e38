"""Whole networks: group counts, invariance in float64, negative controls, stability of the result."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dimat.errors import SymmetryError
from dimat.symmetry import AxisRef, SymmetrySpec, derive_symmetry, verify_symmetry
from dimat.symmetry.verify import randomised
from tests.symmetry.zoo import LARGE, SMALL, ResNet20, case, derived

pytestmark = pytest.mark.zoo


def _groups_in(axis: AxisRef) -> set[str | None]:
    return {factor.group for segment in axis.layout for factor in segment}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", SMALL + LARGE)
def test_groups_are_found_and_leave_outputs_unchanged(name: str) -> None:
    """Reference: group counts by hand (see the zoo) and a float64 forward pass under random group elements.

    Negative control: with one axis left out, the output must change.
    """
    model, spec = case(name).model, derived(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert len(spec.groups) == case(name).groups
    assert verify_symmetry(model, spec, case(name).inputs, generator()) < 1e-9
    assert not spec.unknown_ops
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    axis = next(axis for axis in spec.axes if axis.tensor.endswith("weight") and axis.dim == 1)
    broken = replace(spec, axes=tuple(other for other in spec.axes if other != axis))
    assert verify_symmetry(model, broken, case(name).inputs, generator(1)) > 1e-6


@pytest.mark.parametrize("name", SMALL)
def test_every_moved_axis_is_needed(name: str) -> None:
    """Reference: permuting all of a group but one axis of one tensor must change the output."""
    spec = derived(name)
    chosen = random.Random(0).sample(spec.axes, min(len(spec.axes), 25))
    for axis in chosen:
        broken = replace(spec, axes=tuple(other for other in spec.axes if other != axis))
        # a small group may draw the identity, so there are a few tries
        changes = (_change(name, broken, seed) for seed in range(8))
        assert any(change > 1e-6 for change in changes), f"{axis.tensor} axis {axis.dim} left out, nothing changed"


def _change(name: str, spec: SymmetrySpec, seed: int) -> float:
    """Return how much outputs change, infinity where units have lost the axis of their parents."""
    try:
        return verify_symmetry(case(name).model, spec, case(name).inputs, generator(seed))
    except SymmetryError:
        return float("inf")


@pytest.mark.parametrize("name", ["mlp", "lenet", "vgg", "resnet20-B", "text"])
def test_frozen_axes_of_hidden_layers_are_input_output_or_position(name: str) -> None:
    """Reference: in these networks nothing else can be permuted, so nothing else may be frozen."""
    allowed = ("model input", "model output", "position in a kernel", "spatial axis", "looked up by index")
    assert {f.reason for f in derived(name).frozen if not f.reason.startswith(allowed)} == set()


@pytest.mark.parametrize("name", SMALL)
def test_json_round_trip(name: str) -> None:
    """Reference: `from_json` is the inverse of `to_json`."""
    spec = derived(name)
    assert SymmetrySpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("name", SMALL)
def test_axes_fit_the_tensors(name: str) -> None:
    """Reference: sizes in the model's state dict; sizes of groups; ids sorted and unique."""
    state, spec = case(name).model.state_dict(), derived(name)
    assert all(axis.size == state[axis.tensor].shape[axis.dim] for axis in spec.axes)
    sizes = {group.id: group.size for group in spec.groups}
    factors = [factor for axis in spec.axes for segment in axis.layout for factor in segment]
    assert all(factor.size == sizes[factor.group] for factor in factors if factor.group)
    assert {factor.group for factor in factors if factor.group} == set(sizes)
    assert len(sizes) == len(spec.groups)
    places = {group.id: {(a.tensor, a.dim) for a in spec.axes if group.id in _groups_in(a)} for group in spec.groups}
    assert places == {group.id: set(group.axes) for group in spec.groups}
    assert 0.9 < spec.coverage <= 1


def test_hash_tells_architectures_apart_and_nothing_else() -> None:
    """Reference: another instance, batch size or mode keeps the hash; another width, shape or output does not."""
    inputs = case("resnet20-B").inputs
    spec = derived("resnet20-B")
    other = derive_symmetry(ResNet20("B").train(), torch.randn(5, 3, 32, 32))
    assert other == spec
    assert derive_symmetry(ResNet20("B"), inputs[0][:1]).arch_hash == spec.arch_hash
    assert derive_symmetry(ResNet20("B", 16), inputs).arch_hash != spec.arch_hash
    assert derive_symmetry(ResNet20("A"), inputs).arch_hash != spec.arch_hash


def test_hash_is_the_same_in_another_process() -> None:
    """Reference: a fresh interpreter with another hash seed."""
    code = "from symmetry.zoo import derived; print(derived('unet').arch_hash)"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={"PYTHONHASHSEED": "77", "PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parents[2]}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == derived("unet").arch_hash


def test_option_a_streams_lie_inside_each_other() -> None:
    """Reference: zero channels around the old ones: 16 = 4 + 8 + 4 and 32 = 8 + 16 + 8, by hand."""
    axis = next(axis for axis in derived("resnet20-A").axes if (axis.tensor, axis.dim) == ("linear.weight", 1))
    assert [[f.size for f in segment] for segment in axis.layout] == [[8], [4], [8], [4], [8]]
    assert len({factor.group for segment in axis.layout for factor in segment}) == 5


def test_tied_weights_are_one_tensor() -> None:
    """Reference: the embedding is the output layer; its word axis is fixed by look-up and output alike."""
    spec = derived("text")
    assert spec.tied == (("embedding.weight", "out.weight"),)
    assert {axis.tensor for axis in spec.axes} >= {"embedding.weight"}
    assert "out.weight" not in {axis.tensor for axis in spec.axes}


def test_verify_is_not_fooled_by_fresh_normalisation() -> None:
    """Reference: untouched BatchNorm statistics are constant, so leaving one out would not show."""
    model = copy.deepcopy(case("resnet20-B").model)
    state = randomised(model.state_dict(), generator())
    for key, value in state.items():
        if value.is_floating_point():
            assert value.unique().numel() > 1, key


def test_verify_draws_from_the_given_generator_only() -> None:
    """Reference: equal seeds give equal results, and torch's global generator stays where it was."""
    before = torch.get_rng_state()
    results = [verify_symmetry(case("vgg").model, derived("vgg"), case("vgg").inputs, generator(3)) for _ in range(2)]
    assert results[0] == results[1]
    derive_symmetry(case("vgg").model, case("vgg").inputs)
    assert torch.equal(before, torch.get_rng_state())
