"""Experts in a list of modules, which change places whole, with units of their own inside each."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimat.errors import SymmetryError
from dimat.merge import align_weights
from dimat.merge.moments import spec_of_moments
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
from dimat.symmetry.derive import describe
from dimat.symmetry.observe import Observer
from dimat.symmetry.trace import trace
from tests.symmetry.test_model_kinds import Looped
from tests.symmetry.wide.compositions import SideBySide, Soft


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


@pytest.mark.parametrize("name", LISTS)
def test_permutations_compose_and_invert(name: str) -> None:
    """Reference: one after the other; nothing at all."""
    model, _, spec = experts(name)
    state = state_of(model)
    first, then = (random_permutations(spec, generator(seed)) for seed in (1, 2))
    twice = permute_weights(permute_weights(state, spec, first), spec, then)
    once = permute_weights(state, spec, compose_permutations(first, then, spec))
    back = permute_weights(permute_weights(state, spec, first), spec, invert_permutations(first, spec))
    assert all(torch.equal(twice[key], once[key]) and torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("name", LISTS)
def test_planted_permutations_are_found_by_weights(name: str) -> None:
    """Reference: the permutation that was planted."""
    model, _, spec = experts(name)
    own = state_of(model)
    peer = permute_weights(own, spec, random_permutations(spec, generator(3)))
    back = permute_weights(peer, spec, align_weights(model, own, peer, spec, using="weights"))
    assert all(torch.equal(back[key], own[key]) for key in own)


@pytest.mark.parametrize("name", ["chosen", "side by side"])
def test_planted_permutations_are_found_by_activations(name: str) -> None:
    """Reference: the permutation that was planted. No group is observed at what single experts see or add."""
    model, inputs, spec = experts(name)
    own = state_of(model)
    peer = permute_weights(own, spec, random_permutations(spec, generator(3)))
    data = [(torch.randn(40, 3, generator=generator(seed)),) for seed in range(2)]
    back = permute_weights(peer, spec, align_weights(model, own, peer, spec, data=data, using="activations"))
    assert all(torch.equal(back[key], own[key]) for key in own)
    shown = {point.node for group in spec.groups for point in group.points}
    assert shown
    before = Observer(model, spec, inputs).run(own, inputs, {group.id: group.points for group in spec.groups})
    (group,) = (group for group in spec.groups if group.size == LISTS[name][1])
    turned = permute_weights(own, spec, {group.id: torch.arange(group.size).roll(1)})
    after = Observer(model, spec, inputs).run(turned, inputs, {group.id: group.points for group in spec.groups})
    for key, values in before.items():
        for one, other in zip(values, after[key], strict=True):
            torch.testing.assert_close(one, other)


def test_moments_move_with_their_list_as_far_as_there_are_any() -> None:
    """Reference: weights of the same shapes; an expert that was not trained has none, wherever it stands."""
    model, _, spec = experts("chosen")
    state = state_of(model)
    (group,) = (group for group in spec.groups if group.size == 4)
    drawn = {**random_permutations(spec, generator(6)), group.id: torch.tensor([2, 0, 1, 3])}
    moved = permute_weights(state, spec, drawn)
    moments = {f"exp_avg.{name}": value for name, value in state.items() if not name.startswith("experts.2.")}
    moments |= {f"step.{name}": torch.tensor(float(n)) for n, name in enumerate(state) if "experts.2" not in name}
    found = PermutedWeights(moments, spec_of_moments(moments, spec), drawn)
    lacking = {f"{kind}.{name}" for kind in ("exp_avg", "step") for name in state if name.startswith("experts.0.")}
    assert {*found} == {f"{kind}.{name}" for kind in ("exp_avg", "step") for name in state} - lacking
    assert all(torch.equal(found[f"exp_avg.{k}"], moved[k]) for k in state if not k.startswith("experts.0."))
    assert torch.equal(found["step.experts.2.0.weight"], moments["step.experts.1.0.weight"])


def test_a_list_of_which_some_are_missing_stays_whole() -> None:
    model, _, spec = experts("chosen")
    (group,) = (group for group in spec.groups if group.size == 4)
    some = {key: value for key, value in state_of(model).items() if not key.startswith("experts.2")}
    with pytest.raises(SymmetryError, match=r"'experts\.2\.\d\.\w+' is missing, which should move to the place of"):
        permute_weights(some, spec, {group.id: torch.tensor([2, 0, 1, 3])}, strict=False)


class FirstForAll(Looped):
    """The first expert serves every row too: experts are not alike."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.out(self.experts[0](self.into(x)))


@pytest.mark.filterwarnings("ignore:SYM:dimat.symmetry.SymmetryWarning")
def test_experts_that_are_not_alike_stay() -> None:
    """Reference: the network itself."""
    model, inputs, spec = built(FirstForAll, 7, 3)
    assert not spec.stacks
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
    assert not spec.stacks
    assert [group.size for group in spec.groups] == [8]


@pytest.mark.parametrize("make", [Looped, Soft])
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
        torch.testing.assert_close(found[name], inner.mT @ inner)


class Mixture(nn.Module):
    """Four experts, of which each row takes the best, or all by their shares."""

    def __init__(self, best: bool) -> None:
        super().__init__()
        self.best = best
        self.into, self.gate, self.out = nn.Linear(8, 32), nn.Linear(32, 4), nn.Linear(32, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        shares = self.gate(x).softmax(-1)
        made = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if self.best:
                (rows,) = torch.where(shares.argmax(-1) == number)
                made = made.index_add(0, rows, expert(x[rows]) * shares[rows, number, None])
            else:
                made = made + expert(x) * shares[:, number, None]
        return self.out(x + made)


def _points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return points around twelve centres, three for each of four classes."""
    draws = generator(seed)
    centres = 1.5 * torch.randn(12, 8, generator=generator(5))
    chosen = torch.randint(12, (count,), generator=draws)
    return centres[chosen] + torch.randn(count, 8, generator=draws), chosen % 4


def _trained(best: bool, seed: int) -> Mixture:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Mixture(best)
    x, y = _points(2000, 1)
    optimizer, draws = torch.optim.AdamW(model.parameters(), 3e-3), generator(seed)
    for _ in range(600):
        rows = torch.randint(2000, (128,), generator=draws)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model.eval()


def _barrier(own: nn.Module, peer: nn.Module, spec: SymmetrySpec | None, using: str = "weights") -> float:
    """Return by how much the loss half-way is above the mean of both ends."""
    x, y = _points(2000, 77)
    mine, other = state_of(own), state_of(peer)
    if spec is not None:
        data = [(_points(500, 1)[0],)] if using == "activations" else None
        other = permute_weights(other, spec, align_weights(own, mine, other, spec, data=data, using=using))
    half = {name: (value + other[name]) / 2 for name, value in mine.items()}
    losses = [F.cross_entropy(torch.func.functional_call(own, w, (x,)), y).item() for w in (mine, state_of(peer), half)]
    return losses[2] - (losses[0] + losses[1]) / 2


@pytest.mark.slow
@pytest.mark.parametrize("best", [True, pytest.param(False, marks=pytest.mark.more)])
def test_barrier_of_mixtures_in_lists(best: bool) -> None:
    """Reference: the loss half-way between two trainings without alignment, and with all experts in their places."""
    nets = [_trained(best, seed) for seed in range(4)]
    inputs = _points(32, 3)[0]
    traced = trace(nets[0], inputs)
    inside, _ = describe(traced, traced.select_outputs(None))  # each expert has its units, and none moves
    spec = derive_symmetry(nets[0], inputs)
    assert (len(inside.stacks), len(spec.stacks)) == (0, 4)

    def mean(groups: SymmetrySpec | None, using: str = "weights") -> float:
        return sum(_barrier(*pair, groups, using) for pair in (nets[:2], nets[2:])) / 2

    none, units, experts_too, seen = mean(None), mean(inside), mean(spec), mean(spec, "activations")
    print(f"barrier: none {none:.2f}, units {units:.2f}, experts too {experts_too:.2f}, by activations {seen:.2f}")
    assert experts_too < 0.5 * min(none, units)
