"""Models of kinds that derivation or proof used to fail at: each has its group found and proven."""

from __future__ import annotations

import copy
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.utils import prune

from dimat.errors import SymmetryError
from dimat.symmetry import derive_symmetry, verify_symmetry
from dimat.symmetry.cache import verified_symmetry
from dimat.symmetry.permute import permute_weights, random_permutations


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def sizes(model: nn.Module, inputs: Any) -> list[int]:
    """Return the sizes of a model's groups, all of them proven."""
    spec = derive_symmetry(model, inputs)
    assert verify_symmetry(model, spec, inputs, generator()) <= 1e-9
    return [group.size for group in spec.groups]


class Output(OrderedDict[str, Any]):
    """An output class in the manner of diffusers: registered as a container, without names of its fields."""


pytree.register_pytree_node(  # once in a process, as where the class is defined
    Output, lambda output: (list(output.values()), list(output)), lambda values, names: Output(zip(names, values))
)


class Returns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        y = self.two(torch.tanh(self.one(x)))
        return Output(sample=y, more={"twice": 2 * y})


def test_output_class_without_keys_is_named_by_number() -> None:
    """Reference: by hand, fields in their order; keys below them stay."""
    model, inputs = Returns(), torch.randn(4, 3)
    assert sizes(model, inputs) == [8]
    spec = derive_symmetry(model, inputs, outputs=["1.twice"])
    assert spec.outputs == (1,)


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def _old_weight_norm() -> nn.Module:
    model = _mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is the old one that is tried
        for layer in (model[0], model[2]):
            torch.nn.utils.weight_norm(layer)
    model(torch.randn(4, 3))  # a weight with a history, which deepcopy refuses
    return model


def _pruned() -> nn.Module:
    model = _mlp()
    prune.random_unstructured(model[0], "weight", 0.3)
    model(torch.randn(4, 3))
    return model


class ComplexNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.randn(3, 8, dtype=torch.complex64))
        self.two = nn.Parameter(torch.randn(8, 2, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.to(torch.complex64 if x.dtype == torch.float32 else torch.complex128) @ self.one
        return (hidden * hidden.abs()) @ self.two


class Overflows(nn.Module):
    """Masks with a number that only float32 takes for finite."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.one(x)
        if hidden.dtype == torch.float64:
            hidden = hidden * float("nan")
        return self.two(torch.tanh(hidden))


class Logarithm(nn.Module):
    """Its scale must be positive: noise of any sign makes it NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 2)
        self.scale = nn.Parameter(torch.full((8,), 0.01))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)) * self.scale.log())


@pytest.mark.parametrize("build", [_old_weight_norm, _pruned, lambda: nn.DataParallel(_mlp()), ComplexNet, Logarithm])
def test_kinds_of_models_are_proven(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Reference: one hidden layer of 8 units, by hand."""
    torch.manual_seed(0)
    model, inputs = build(), torch.randn(4, 3)
    assert sizes(model, inputs) == [8]
    assert [group.size for group in verified_symmetry(model, inputs, generator(), folder=tmp_path).groups] == [8]


def test_imaginary_parts_count() -> None:
    """Reference: by hand, units moved in the first factor only change the product's imaginary part too."""
    model, inputs = ComplexNet(), torch.randn(4, 3)
    with torch.no_grad():  # nothing real is left
        for parameter in model.parameters():
            parameter.copy_(1j * parameter.imag)
    spec = derive_symmetry(model, inputs)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    moved = permute_weights(state, spec, random_permutations(spec, generator()))
    assert not torch.equal(moved["one"].imag, state["one"].imag)
    torch.testing.assert_close(moved["one"] @ moved["two"], state["one"] @ state["two"])


def test_model_that_is_nan_in_float64_is_proven_in_float32() -> None:
    """Reference: the same network by hand in float32."""
    model, inputs = Overflows(), torch.randn(4, 3)
    spec = derive_symmetry(model, inputs)
    assert [group.size for group in spec.groups] == [8]
    assert verify_symmetry(model, spec, inputs, generator()) <= 1e-5


def test_nan_everywhere_is_one_clear_line() -> None:
    model, inputs = _mlp(), torch.full((4, 3), float("nan"))
    spec = derive_symmetry(model, torch.randn(4, 3))
    with pytest.raises(SymmetryError, match="NaN for the example inputs"):
        verify_symmetry(model, spec, inputs, generator())


def test_forward_that_fails_is_one_clear_line() -> None:
    model = _mlp()
    spec = derive_symmetry(model, torch.randn(4, 3))
    with pytest.raises(SymmetryError, match="the model cannot be run, so invariance cannot be checked: RuntimeError"):
        verify_symmetry(model, spec, torch.randn(4, 7), generator())


class Draws(nn.Module):
    """One hidden layer whose activations meet a random draw."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.operation = operation
        self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.operation(torch.tanh(self.one(x))))


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "randn_like": lambda h: h + torch.randn_like(h),
    "randn": lambda h: h * torch.randn(h.shape[-1], dtype=h.dtype),
    "rand": lambda h: h * (torch.rand(h.shape, dtype=h.dtype) > 0.5),
    "randint": lambda h: h * torch.randint(1, 4, h.shape),
    "bernoulli": lambda h: torch.bernoulli(h.sigmoid()) + h,
    "bernoulli with one chance": lambda h: h * torch.empty_like(h).bernoulli_(0.7),
    "normal in place": lambda h: h + torch.empty_like(h).normal_(0.2, 0.5),
    "uniform in place": lambda h: h + h.new_empty(h.shape).uniform_(-1, 1),
    "normal": lambda h: torch.normal(h, 0.1),
    "exponential": lambda h: h - torch.empty_like(h).exponential_().log(),
    "gumbel softmax": lambda h: F.gumbel_softmax(h),
    "dropout in eval mode": lambda h: F.dropout(h, 0.4, training=True),
    "alpha dropout": lambda h: F.alpha_dropout(h, 0.4, training=True),
    "rrelu": lambda h: F.rrelu(h, training=True),
    "poisson": lambda h: torch.poisson(h.abs() * 4) + h,
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_draws_keep_the_group(name: str) -> None:
    """Reference: the distribution of the output does not depend on the order of the 8 units."""
    before = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert sizes(Draws(DRAWS[name]), torch.randn(4, 3)) == [8]
    torch.random.set_rng_state(before)


def test_the_check_leaves_random_streams_alone() -> None:
    model, inputs = Draws(lambda h: h + torch.randn_like(h) * random.random()), torch.randn(4, 3)
    spec = derive_symmetry(model, inputs)
    states = torch.random.get_rng_state(), random.getstate()
    verify_symmetry(model, spec, inputs, generator())
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert states[1] == random.getstate()


def test_wrong_group_fails_beside_a_draw() -> None:
    """Reference: by hand, a read-out that multiplies unit j by j does not commute with permutations."""
    model, inputs = Draws(lambda h: h + torch.randn_like(h)), torch.randn(4, 3)
    spec = derive_symmetry(model, inputs)
    wrong = Draws(lambda h: (h + torch.randn_like(h)) * torch.arange(8))
    assert verify_symmetry(wrong, spec, inputs, generator()) > 1e-3


def test_sampling_by_number_freezes_what_is_sampled() -> None:
    """Reference: by hand, an index names a unit, so that none may move."""
    model = Draws(lambda h: h * torch.multinomial(h.exp(), 1))
    inputs = torch.randn(4, 3)
    assert sizes(model, inputs) == []
    assert copy.deepcopy(model) is not model


class Repeated(nn.Module):
    """Refuses rows without exactly one end token, which permuting integers across rows breaks; loops on data."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one, self.two = nn.Embedding(6, 4), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        ends = (tokens == 5).sum(1)
        if bool((ends != ends[0]).any()):
            raise ValueError("all rows must have as many end tokens")
        hidden = torch.tanh(self.one(self.embed(tokens).mean(1)))
        return self.two(torch.cat([hidden[:1] * int(ends[0]), hidden[1:]]))


def test_integers_change_places_within_their_row() -> None:
    """Reference: one hidden layer of 8 units and the 4 columns of the embedding, by hand."""
    tokens = torch.stack([torch.tensor([0, 1, 5, 2]), torch.tensor([5, 3, 3, 4]), torch.tensor([1, 1, 2, 5])])
    model = Repeated()
    spec = derive_symmetry(model, tokens)
    assert spec.trace_kind == "make_fx"
    assert sorted(group.size for group in spec.groups) == [4, 8]
    assert verify_symmetry(model, spec, tokens, generator()) <= 1e-9


class Fussy(nn.Module):
    """Takes a path by value, and refuses a mean below zero."""

    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.always = always
        self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.always or float(x.mean()) < 0:
            raise ValueError("values must be positive")
        return self.two(torch.tanh(self.one(x)))


def test_paths_that_worked_are_kept() -> None:
    """Reference: one hidden layer of 8 units; half of all drawn inputs are refused."""
    assert sizes(Fussy(), torch.rand(4, 3)) == [8]


def test_both_causes_are_told() -> None:
    with pytest.warns(UserWarning, match=r"ValueError: values must be positive") as told:
        derive_symmetry(Fussy(), -torch.rand(4, 3))
    assert "torch.export raised" in str(told[0].message)


EDGES = torch.tensor([[0, 1, 2, 3, 3, 4, 0], [1, 1, 0, 4, 2, 0, 3]])


class GraphConvolution(nn.Module):
    """Two layers of GCN, written out as torch_geometric does it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.spread(self.two(torch.relu(self.spread(self.one(x), edges))), edges)

    def spread(self, x: Tensor, edges: Tensor) -> Tensor:
        ones = torch.ones(edges.shape[1], dtype=x.dtype)
        degree = torch.zeros(x.shape[0], dtype=x.dtype).scatter_add_(0, edges[1], ones).clamp(min=1).pow(-0.5)
        weight = (degree[edges[0]] * degree[edges[1]])[:, None]
        return x.new_zeros(x.shape[0], x.shape[1]).index_add_(0, edges[1], x.index_select(0, edges[0]) * weight)


class GraphAttention(nn.Module):
    """A layer of GAT with four heads of six channels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.out = nn.Linear(3, 24, bias=False), nn.Linear(24, 2)
        self.source, self.target = nn.Parameter(torch.randn(1, 4, 6)), nn.Parameter(torch.randn(1, 4, 6))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        hidden = self.one(x).view(-1, 4, 6)
        scores = F.leaky_relu((hidden * self.source).sum(-1)[edges[0]] + (hidden * self.target).sum(-1)[edges[1]])
        places = edges[1][:, None].expand(-1, 4)
        zeros = torch.zeros(x.shape[0], 4, dtype=x.dtype)
        largest = zeros.scatter_reduce(0, places, scores.detach(), "amax", include_self=False)
        scores = (scores - largest.index_select(0, edges[1])).exp()
        shares = scores / zeros.scatter_add(0, places, scores).index_select(0, edges[1])
        made = torch.zeros(x.shape[0], 4, 6, dtype=x.dtype)
        made = made.scatter_add(0, places[..., None].expand(-1, 4, 6), hidden[edges[0]] * shares[..., None])
        return self.out(F.elu(made.flatten(1)))


class GraphIsomorphism(nn.Module):
    """A layer of GIN, and graphs pooled by number, of which there are as many as the data say."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(1))
        self.mlp = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        hidden = self.mlp((1 + self.eps) * x + torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]))
        return self.out(hidden.new_zeros(int(graph.max()) + 1, 6).index_add(0, graph, hidden))


class Looped(nn.Module):
    """A mixture of four experts, each run on the tokens that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.router, self.out = nn.Linear(3, 8), nn.Linear(8, 4), nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        made = torch.zeros_like(x)
        mask = F.one_hot(chosen, 4).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            rank, token = torch.where(mask[number])
            made.index_add_(0, token, expert(x[token]) * weights[token, rank, None])
        return self.out(made)


class Interleaved(nn.Module):
    """Experts in the manner of GPT-OSS: gate and up projections are every other column."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.router, self.out = nn.Linear(3, 8), nn.Linear(8, 4), nn.Linear(8, 2)
        self.gate_up, self.gate_up_bias = nn.Parameter(torch.randn(4, 8, 12)), nn.Parameter(torch.randn(4, 12))
        self.down, self.down_bias = nn.Parameter(torch.randn(4, 6, 8)), nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        scores = self.router(x)
        values, chosen = scores.topk(2, -1)
        scores = torch.zeros_like(scores).scatter_(1, chosen, values.softmax(-1))
        both = torch.bmm(x.repeat(4, 1).view(4, -1, 8), self.gate_up) + self.gate_up_bias[..., None, :]
        gate, up = both[..., ::2].clamp(max=7.0), both[..., 1::2].clamp(-7.0, 7.0)
        made = torch.bmm((up + 1) * gate * torch.sigmoid(gate * 1.702), self.down) + self.down_bias[..., None, :]
        return self.out((made.view(4, -1, 8) * scores.mT.view(4, -1)[..., None]).sum(0))


class Either(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.scale = nn.Linear(3, 8), nn.Linear(8, 2), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        given = (self.one(x), self.scale)
        return self.two(torch.cond(x.sum() > 0, lambda h, k: h.sin() * k, lambda h, k: h.cos() + k, given))


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: self.two(torch.tanh(self.one(row))))(x)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], list[int]]] = {
    "GCN": (GraphConvolution, (torch.randn(5, 3), EDGES), [8]),
    "GAT": (GraphAttention, (torch.randn(5, 3), EDGES), [4, 6]),
    "GIN": (GraphIsomorphism, (torch.randn(5, 3), EDGES, torch.tensor([0, 0, 1, 1, 1])), [6, 8]),
    # the stream between the experts' biases and the rest is one group, that before them another
    "looped experts": (Looped, (torch.randn(5, 3),), [4, 6, 8, 8]),
    "interleaved experts": (Interleaved, (torch.randn(5, 3),), [4, 6, 8, 8]),
    "vmap": (Mapped, (torch.randn(5, 3),), [8]),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    """Reference: hidden units, heads and the channels of each, and each expert's units, by hand."""
    torch.manual_seed(0)
    build, inputs, found = FAMILIES[name]
    assert sorted(sizes(build(), inputs)) == found


def test_branches_of_cond_are_permuted_alike() -> None:
    """Reference: one group of 8 units in both branches, by hand; both are proven."""
    torch.manual_seed(0)
    model, inputs = Either(), torch.rand(5, 3)
    spec = derive_symmetry(model, inputs)
    assert [group.size for group in spec.groups] == [8]
    assert ("scale", 0) in spec.groups[0].axes
    assert verify_symmetry(model, spec, inputs, generator()) <= 1e-9
    state = {name: value.detach() for name, value in model.state_dict().items()}
    moved = permute_weights(state, spec, random_permutations(spec, generator()))
    assert not torch.equal(moved["scale"], state["scale"])
    for given in (inputs, -inputs):
        hidden = [F.linear(given, w["one.weight"], w["one.bias"]) for w in (state, moved)]
        branch: Any = (lambda h, k: h.sin() * k) if given is inputs else (lambda h, k: h.cos() + k)
        one, two = (
            F.linear(branch(h, w["scale"]), w["two.weight"], w["two.bias"]) for h, w in zip(hidden, (state, moved))
        )
        torch.testing.assert_close(one, two)
