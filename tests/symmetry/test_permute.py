"""Applying permutations to weights, buffers and optimizer state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dimat.errors import SymmetryError
from dimat.symmetry import (
    compose_permutations,
    invert_permutations,
    permute_optimizer,
    permute_weights,
    random_permutations,
)
from tests.symmetry.zoo import MLP, SMALL, case, derived


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SMALL), st.integers(0, 10**6))
def test_inverse_undoes(name: str, seed: int) -> None:
    """Reference: apply(p⁻¹) ∘ apply(p) is the identity, bit for bit, and the input is untouched."""
    state, spec = case(name).model.state_dict(), derived(name)
    before = {key: value.clone() for key, value in state.items()}
    p = random_permutations(spec, generator(seed))
    moved = permute_weights(state, spec, p)
    back = permute_weights(moved, spec, invert_permutations(p, spec))
    assert list(back) == list(state)
    assert all(torch.equal(back[key], before[key]) and torch.equal(state[key], before[key]) for key in state)
    assert any(not torch.equal(moved[key], before[key]) for key in state)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(SMALL), st.integers(0, 10**6))
def test_composition(name: str, seed: int) -> None:
    """Reference: applying p then q."""
    state, spec = case(name).model.state_dict(), derived(name)
    p, q = (random_permutations(spec, generator(seed + i)) for i in range(2))
    del p[next(iter(p))]
    twice = permute_weights(permute_weights(state, spec, p), spec, q)
    once = permute_weights(state, spec, compose_permutations(p, q, spec))
    assert all(torch.equal(twice[key], once[key]) for key in state)


def test_new_unit_j_is_old_unit_p_j() -> None:
    """Reference: W'[j] = W[p[j]] on the layer that makes the units, W'[:, j] = W[:, p[j]] on the one that reads."""
    state, spec = case("mlp").model.state_dict(), derived("mlp")
    group = next(group for group in spec.groups if ("layers.0.weight", 0) in group.axes)
    p = torch.randperm(group.size, generator=generator())
    moved = permute_weights(state, spec, {group.id: p})
    assert torch.equal(moved["layers.0.weight"], state["layers.0.weight"][p])
    assert torch.equal(moved["layers.0.bias"], state["layers.0.bias"][p])
    assert torch.equal(moved["layers.1.weight"], state["layers.1.weight"][:, p])
    assert moved["layers.2.weight"] is state["layers.2.weight"]


def test_buffers_move_and_counters_stay() -> None:
    """Reference: BatchNorm's statistics follow its channels; `num_batches_tracked` is a number."""
    model, spec = copy.deepcopy(case("vgg").model), derived("vgg")
    for key, value in model.state_dict().items():
        if key.endswith("running_mean"):
            value.copy_(torch.arange(value.numel()))
    group = next(group for group in spec.groups if ("features.1.running_mean", 0) in group.axes)
    p = torch.randperm(group.size, generator=generator())
    moved = permute_weights(model.state_dict(), spec, {group.id: p})
    assert torch.equal(moved["features.1.running_mean"], p.float())
    assert int(moved["features.1.num_batches_tracked"]) == 0


@pytest.mark.parametrize("given", ["both", "embedding.weight", "out.weight"])
def test_tied_tensors_move_once_and_stay_tied(given: str) -> None:
    """Reference: one tensor under two names, or saved under either."""
    state, spec = case("text").model.state_dict(), derived("text")
    if given != "both":
        gone = {"embedding.weight", "out.weight"} - {given}
        state = {key: value for key, value in state.items() if key not in gone}
    moved = permute_weights(state, spec, random_permutations(spec, generator()))
    names = [name for name in ("embedding.weight", "out.weight") if name in moved]
    assert len(names) == (2 if given == "both" else 1)
    assert all(moved[name] is moved[names[0]] for name in names)
    assert torch.equal(moved[names[0]].sort(1).values, state[names[0]].sort(1).values)
    assert not torch.equal(moved[names[0]], state[names[0]])


def _bad(group: str, size: int) -> list[tuple[str, Callable[[dict[str, Tensor]], Any], dict[str, Tensor]]]:
    identity = torch.arange(size)
    return [
        ("unknown symmetry group 'nowhere'", dict, {"nowhere": identity}),
        ("shape", dict, {group: identity[1:]}),
        ("is not valid", dict, {group: torch.zeros(size, dtype=torch.long)}),
        ("is not valid", dict, {group: identity - 1}),
        ("integers", dict, {group: identity.float()}),
        ("'layers.1.weight' is missing", lambda s: {k: v for k, v in s.items() if k != "layers.1.weight"}, {}),
        ("'layers.1.weight' has shape", lambda s: {**s, "layers.1.weight": torch.zeros(2, 2)}, {}),
    ]


@pytest.mark.parametrize("number", range(7))
def test_what_does_not_fit_is_named(number: int) -> None:
    """Reference: the error names the group or tensor at fault."""
    spec = derived("mlp")
    message, change, permutations = _bad(spec.groups[0].id, spec.groups[0].size)[number]
    with pytest.raises(SymmetryError, match=message):
        permute_weights(change(case("mlp").model.state_dict()), spec, permutations)


def test_partial_state_is_allowed_when_asked_for() -> None:
    """Reference: statistics that exist for some tensors only, e.g. a Fisher diagonal of parameters."""
    spec = derived("mlp")
    part = {"layers.0.bias": torch.arange(9.0)}
    p = random_permutations(spec, generator())
    group = next(group for group in spec.groups if ("layers.0.bias", 0) in group.axes)
    assert torch.equal(permute_weights(part, spec, p, strict=False)["layers.0.bias"], p[group.id].float())


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("network", ["mlp", "vgg", "text"])
def test_training_commutes_with_permuting(name: str, network: str) -> None:
    """Reference: permute model and optimizer, then take a step = take the step, then permute (float64)."""
    spec = derived(network)
    inputs = case(network).inputs[0]
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    p = random_permutations(spec, generator(1))

    def setup() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = copy.deepcopy(case(network).model).double().eval()
        return model, OPTIMIZERS[name](model.parameters())

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        noise = torch.randn(model(inputs).shape, generator=generator(seed), dtype=torch.float64)
        ((model(inputs) - noise) ** 2).mean().backward()
        optimizer.step()

    one, optimizer = setup()
    names = [key for key, _ in one.named_parameters()]
    for seed in range(2):
        step(one, optimizer, seed)
    other, twin = setup()
    other.load_state_dict(permute_weights(one.state_dict(), spec, p))
    twin.load_state_dict(permute_optimizer(copy.deepcopy(optimizer.state_dict()), spec, p, names))
    step(one, optimizer, 2)
    step(other, twin, 2)
    expected = permute_weights(one.state_dict(), spec, p)
    for key, value in other.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-11)
    moments = permute_optimizer(optimizer.state_dict(), spec, p, names)["state"]
    for number, entries in twin.state_dict()["state"].items():
        for key, value in entries.items():
            torch.testing.assert_close(value, moments[number][key], rtol=1e-9, atol=1e-11)


def test_optimizer_state_is_not_modified_and_must_fit() -> None:
    """Reference: the state handed in stays equal; a wrong number of names is refused."""
    model, spec = MLP(), derived("mlp")
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 12)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    names = [key for key, _ in model.named_parameters()]
    moved = permute_optimizer(state, spec, random_permutations(spec, generator()), names)
    assert str(before) == str(state)
    assert moved["param_groups"] == state["param_groups"]
    assert moved["state"][0]["step"] is state["state"][0]["step"]
    with pytest.raises(SymmetryError, match="5 parameter names for an optimizer of 6"):
        permute_optimizer(state, spec, {}, names[1:])
    with pytest.raises(SymmetryError, match=r"layers\.\d\.(weight|bias) \(exp_avg"):
        permute_optimizer(state, spec, {}, names[::-1])
