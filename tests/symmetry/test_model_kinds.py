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
