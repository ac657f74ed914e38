"""Experts in a list of modules, which change places whole; layers taken from one tensor, with units of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimat.errors import SymmetryError
from dimat.merge import align_weights
from dimat.merge.shared_statistics import permuted
from dimat.merge.weight_views import PermutedWeights
from dimat.symmetry import (
    SymmetrySpec,
    compose_permutations,
    derive_symmetry,
    invert_permutations,
    permute_optimizer,
    permute_weights,
    random_permutations,
    verify_symmetry,
)
from dimat.symmetry.verify import without_groups
from tests.symmetry.test_model_kinds import Looped


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class SideBySide(nn.Module):
    """The best of three experts for each row; a list for each of their matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.gate, self.out = nn.Linear(3, 8), nn.Linear(8, 3, bias=False), nn.Linear(8, 2)
        self.up = nn.ModuleList(nn.Linear(8, 6) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(6, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        share, chosen = self.gate(x).softmax(-1).max(-1)
        made = torch.zeros_like(x)
        for number, (up, down) in enumerate(zip(self.up, self.down)):
            rows = (chosen == number).nonzero().flatten()
            made = made.index_add(0, rows, down(torch.relu(up(x[rows]))) * share[rows, None])
        return self.out(x + made)


class Soft(nn.Module):
    """Every expert, with a normalisation of its own, on every row, weighted, at once or one after the other."""

    def __init__(self, singly: bool = False) -> None:
        super().__init__()
        self.singly = singly
        self.into, self.gate, self.out = nn.Linear(3, 8), nn.Linear(8, 4), nn.Linear(8, 2)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 8)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        shares = self.gate(x).softmax(-1)
        if self.singly:
            return self.out(x + sum(shares[:, n, None] * expert(x) for n, expert in enumerate(self.experts)))
        made = torch.stack([expert(x) for expert in self.experts], -1)
        return self.out(x + (made * shares[:, None]).sum(-1))


LISTS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "chosen": (Looped, 4, 6),
    "side by side": (SideBySide, 3, 6),
    "soft": (Soft, 4, 6),
    "soft, one by one": (lambda: Soft(singly=True), 4, 6),
}
"""Models, how many experts, and units in each."""


def built(make: Callable[[], nn.Module], *shape: int) -> tuple[nn.Module, Tensor, SymmetrySpec]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = make().eval(), torch.randn(*shape)
    return model, inputs, derive_symmetry(model, inputs)


def experts(name: str) -> tuple[nn.Module, Tensor, SymmetrySpec]:
    return built(LISTS[name][0], 7, 3)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", LISTS)
def test_experts_of_a_list_are_a_group(name: str) -> None:
    """Reference: groups by hand; the network itself under random permutations."""
    model, inputs, spec = experts(name)
    _, count, units = LISTS[name]
    (inside,) = (group for group in spec.groups if group.parents)
    assert (spec.sizes[inside.parents[0]], inside.size) == (count, units)
    assert verify_symmetry(model, spec, inputs, generator()) < 1e-9
    assert SymmetrySpec.from_json(spec.to_json()) == spec
    assert spec.coverage == 1.0
    drawn = random_permutations(spec, generator())
    assert any(not torch.equal(row, drawn[inside.id][0]) for row in drawn[inside.id])


def test_experts_change_places_with_their_rows_of_the_router() -> None:
    """Reference: by hand: what expert 2 was is expert 0 now, its row of the router too."""
    model, inputs, spec = experts("chosen")
    (group,) = (group for group in spec.groups if group.size == 4)
    assert {("router.weight", 0), ("router.bias", 0)} <= {*group.axes}
    state = state_of(model)
    moved = permute_weights(state, spec, {group.id: torch.tensor([2, 0, 1, 3])})
    for end in ("0.weight", "0.bias", "2.weight", "2.bias"):
        for new, old in enumerate((2, 0, 1, 3)):
            assert torch.equal(moved[f"experts.{new}.{end}"], state[f"experts.{old}.{end}"])
    assert torch.equal(moved["router.weight"], state["router.weight"][[2, 0, 1, 3]])
    torch.testing.assert_close(torch.func.functional_call(model, moved, (inputs,)), model(inputs))
    before = {value.data_ptr() for value in state.values()}
    assert all(moved[f"experts.{number}.0.weight"].data_ptr() not in before for number in range(3))


@pytest.mark.parametrize("name", LISTS)
def test_one_tensor_at_a_time_is_the_same(name: str) -> None:
    """Reference: all tensors at once."""
    model, _, spec = experts(name)
    state, drawn = state_of(model), random_permutations(spec, generator(1))
    moved = permute_weights(state, spec, drawn)
    one_by_one = PermutedWeights(state, spec, drawn)
    assert [*one_by_one] == [*state]
    assert all(torch.equal(one_by_one[key], moved[key]) for key in state)


@pytest.mark.parametrize("name", [*LISTS, "parts"])
def test_permutations_compose_and_invert(name: str) -> None:
    """Reference: one after the other; nothing at all."""
    model, _, spec = built(Layers, 5, 3) if name == "parts" else experts(name)
    state = state_of(model)
    first, then = (random_permutations(spec, generator(seed)) for seed in (1, 2))
    twice = permute_weights(permute_weights(state, spec, first), spec, then)
    once = permute_weights(state, spec, compose_permutations(first, then, spec))
    back = permute_weights(permute_weights(state, spec, first), spec, invert_permutations(first, spec))
    assert all(torch.equal(twice[key], once[key]) and torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("name", [*LISTS, "parts"])
def test_planted_permutations_are_found_by_weights(name: str) -> None:
    """Reference: the permutation that was planted."""
    model, _, spec = built(Layers, 5, 3) if name == "parts" else experts(name)
    own = state_of(model)
    peer = permute_weights(own, spec, random_permutations(spec, generator(3)))
    back = permute_weights(peer, spec, align_weights(model, own, peer, spec, using="weights"))
    assert all(torch.equal(back[key], own[key]) for key in own)


def test_a_list_of_which_some_are_missing_stays_whole() -> None:
    model, _, spec = experts("chosen")
    (group,) = (group for group in spec.groups if group.size == 4)
    some = {key: value for key, value in state_of(model).items() if not key.startswith("experts.2")}
    with pytest.raises(SymmetryError, match=r"'experts\.2\.\d\.\w+' is missing, which is to come to the place of"):
        permute_weights(some, spec, {group.id: torch.tensor([2, 0, 1, 3])}, strict=False)


class FirstForAll(Looped):
    """The first expert serves every row too: experts are not alike."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.out(self.experts[0](self.into(x)))


@pytest.mark.filterwarnings("ignore:SYM:dimat.symmetry.SymmetryWarning")
def test_experts_that_are_not_alike_stay() -> None:
    """Reference: the network itself."""
    model, inputs, spec = built(FirstForAll, 7, 3)
    assert not spec.views
    assert verify_symmetry(model, spec, inputs, generator()) < 1e-12


class Deep(nn.Module):
    """Four layers in a list and four classes: no experts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.into, self.out = nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.out(x)


def test_layers_of_a_list_are_no_experts() -> None:
    _, _, spec = built(Deep, 7, 3)
    assert not spec.views
    assert [group.size for group in spec.groups] == [8]


class Layers(nn.Module):
    """Three residual layers on top of each other in one tensor for each of their matrices, taken in three ways."""

    def __init__(self, how: str = "number") -> None:
        super().__init__()
        self.how = how
        self.into, self.out = nn.Linear(3, 8), nn.Linear(8, 2)
        self.up, self.bias = nn.Parameter(torch.randn(3, 12, 8) / 3), nn.Parameter(torch.randn(3, 12))
        self.down = nn.Parameter(torch.randn(8, 3, 12) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        if self.how == "unbind":
            taken = zip(self.up.unbind(0), self.bias.unbind(0), self.down.unbind(1))
        elif self.how == "chunk":
            pieces = zip(self.up.chunk(3), self.bias.split(1), self.down.chunk(3, 1))
            taken = ((up[0], bias[0], down[:, 0]) for up, bias, down in pieces)
        else:
            taken = ((self.up[n], self.bias[n], self.down[:, n]) for n in range(3))
        for up, bias, down in taken:
            x = x + F.linear(torch.relu(F.linear(x, up, bias)), down)
        return self.out(x)


@pytest.mark.parametrize("how", ["number", "unbind", "chunk"])
def test_layers_of_a_stack_have_units_of_their_own(how: str) -> None:
    """Reference: by hand, twelve units in each of three layers, and the stream between them."""
    model, inputs, spec = built(lambda: Layers(how), 5, 3)
    assert sorted(group.size for group in spec.groups) == [8, 12, 12, 12]
    assert not any(group.parents for group in spec.groups)
    assert all(group.points for group in spec.groups)  # each is seen in its own layer
    assert verify_symmetry(model, spec, inputs, generator()) < 1e-12
    (middle,) = (group for group in spec.groups if ("up[1]", 0) in group.axes)
    order = torch.randperm(12, generator=generator())
    state = state_of(model)
    moved = permute_weights(state, spec, {middle.id: order})
    assert torch.equal(moved["up"][1], state["up"][1][order])
    assert torch.equal(moved["down"][:, 1], state["down"][:, 1][:, order])
    assert torch.equal(moved["up"][[0, 2]], state["up"][[0, 2]])
    assert spec.coverage == 1.0


class Chain(nn.Module):
    """Square layers in one tensor: what one makes the next takes."""

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.whole = whole
        self.layers = nn.Parameter(torch.randn(4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(x @ layer)
        return x + self.layers.sum(0) if self.whole else x


def test_units_between_layers_of_a_stack_are_groups() -> None:
    """Reference: by hand: three units after each layer but the last; none where the layers are also summed up."""
    model, inputs, spec = built(Chain, 5, 3)
    assert [group.size for group in spec.groups] == [3, 3, 3]
    assert verify_symmetry(model, spec, inputs, generator()) < 1e-12
    model, inputs, spec = built(lambda: Chain(whole=True), 3, 3)
    assert not spec.groups
    assert not spec.views


class Ensemble(nn.Module):
    """Four perceptrons, mapped over: each has units of its own, and their mean does not depend on their order."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.mean = mean
        self.up, self.bias = nn.Parameter(torch.randn(4, 8, 3)), nn.Parameter(torch.randn(4, 8))
        self.down = nn.Parameter(torch.randn(4, 2, 8))

    def forward(self, x: Tensor) -> Tensor:
        def one(up: Tensor, bias: Tensor, down: Tensor, x: Tensor) -> Tensor:
            return torch.func.vmap(lambda row: F.linear(torch.relu(F.linear(row, up, bias)), down))(x)

        made = torch.func.vmap(one, in_dims=(0, 0, 0, None))(self.up, self.bias, self.down, x)
        return made.mean(0) if self.mean else made


@pytest.mark.parametrize(("mean", "sizes"), [(True, [4, 8]), (False, [8])])
def test_what_is_mapped_over_keeps_units_of_its_own(mean: bool, sizes: list[int]) -> None:
    """Reference: by hand; members of an ensemble are units themselves where only their mean is used."""
    model, inputs, spec = built(lambda: Ensemble(mean), 5, 3)
    assert sorted(group.size for group in spec.groups) == sizes
    (inside,) = (group for group in spec.groups if group.parents)
    assert spec.sizes[inside.parents[0]] == 4
    assert len(spec.numbered) == (not mean)
    assert verify_symmetry(model, spec, inputs, generator()) < 1e-12


class Stacked(nn.Module):
    """Query, key and value in one tensor, two heads of four units."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.proj, self.out = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.qkv = nn.Parameter(torch.randn(2, 24, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for both in self.qkv:
            q, k, v = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in F.linear(x, both).chunk(3, -1))
            mixed: Any = F.scaled_dot_product_attention(q, k, v)
            x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return self.out(x)


def test_heads_in_layers_of_a_stack() -> None:
    """Reference: by hand: the stream; the heads and their values, shared as the projection is; keys of each layer."""
    model, inputs, spec = built(Stacked, 2, 5, 3)
    assert sorted((group.size, len(group.parents)) for group in spec.groups) == [(2, 0), (4, 1), (4, 1), (4, 1), (8, 0)]
    assert verify_symmetry(model, spec, inputs, generator()) < 1e-12


@pytest.mark.parametrize("make", [Looped, Soft, Layers])
def test_training_goes_on_as_it_would_have(make: Callable[[], nn.Module]) -> None:
    """Reference: the same steps of Adam without a permutation, permuted afterwards."""
    model, inputs, spec = built(make, 7, 3)
    model.double()
    targets = torch.randn(7, 2, generator=generator(), dtype=torch.float64)
    drawn = random_permutations(spec, generator(5))

    def steps(optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            F.mse_loss(model(inputs.double()), targets).backward()
            optimizer.step()

    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    steps(optimizer, 3)
    start, held = state_of(model), copy.deepcopy(optimizer.state_dict())
    steps(optimizer, 3)
    expected = permute_weights(state_of(model), spec, drawn)
    model.load_state_dict(permute_weights(start, spec, drawn))
    again = torch.optim.Adam(model.parameters(), 1e-2)
    again.load_state_dict(permute_optimizer(held, spec, drawn, dict(model.named_parameters())))
    steps(again, 3)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


def test_statistics_move_with_their_list() -> None:
    """Reference: Fisher diagonals as weights of the same shapes; a Gram matrix by hand, both of its axes."""
    model, _, spec = experts("chosen")
    state, drawn = state_of(model), random_permutations(spec, generator(6))
    moved = permute_weights(state, spec, drawn)
    fisher = permuted({f"fisher.{name}": value for name, value in state.items()}, spec, drawn)
    assert all(torch.equal(fisher[f"fisher.{name}"], moved[name]) for name in state)
    gram = {f"gram.{name}": value.mT @ value for name, value in state.items() if value.ndim == 2}
    found = permuted(gram, spec, drawn)
    for name in gram:
        inner = moved[name.removeprefix("gram.")]
        torch.testing.assert_close(found[name].diagonal().sum(), (inner.mT @ inner).diagonal().sum())


def test_where_experts_stay_their_units_still_move() -> None:
    """Reference: the groups by hand: one of four experts in a list, with units of their own inside each."""
    spec = derive_symmetry(Looped().eval(), torch.randn(9, 3, generator=generator(9)))
    (group,) = (group for group in spec.groups if group.size == 4)
    inner = {other.id for other in spec.groups if group.id in other.parents}
    assert inner
    assert without_groups(spec, {group.id}, "").sizes.keys().isdisjoint(inner)
