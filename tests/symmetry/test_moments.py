"""The state of any optimizer in another order of units.

References: a step after permuting is the permuted step; torch's own optimizers and small ones written out here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimat.errors import SymmetryError
from dimat.symmetry import SymmetryWarning, derive_symmetry, permute_optimizer, permute_weights, random_permutations

SQUARE = 6
X = torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Network(nn.Module):
    """Matrices, square ones too, a convolution and vectors: parameters of every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, SQUARE)
        self.square = nn.Linear(SQUARE, SQUARE)
        self.conv = nn.Conv1d(SQUARE, 5, 1)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.square(torch.relu(self.first(x))))
        return self.out(torch.relu(self.conv(hidden[:, :, None])).flatten(1))


class Rows(torch.optim.Optimizer):
    """Adafactor as transformers has it: rows and columns without the axis that they are reduced over."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            state, square = self.state[p], p.grad**2
            if p.ndim < 2:
                state["exp_avg_sq"] = state.get("exp_avg_sq", 0) + square
                p -= 1e-2 * p.grad / (state["exp_avg_sq"].sqrt() + 1e-3)
                continue
            state["exp_avg_sq_row"] = state.get("exp_avg_sq_row", 0) + square.mean(-1)
            state["exp_avg_sq_col"] = state.get("exp_avg_sq_col", 0) + square.mean(-2)
            root = state["exp_avg_sq_row"].sqrt().unsqueeze(-1) * state["exp_avg_sq_col"].sqrt().unsqueeze(-2)
            p -= 1e-2 * p.grad / (root + 1e-3)


class Shampoo(torch.optim.Optimizer):
    """Shampoo (arXiv 1802.09568) with a block of each axis, by the names of pytorch-optimizer."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            state, step = self.state[p], p.grad
            for dim, size in enumerate(p.shape):
                flat = p.grad.movedim(dim, 0).reshape(size, -1)
                eye = torch.eye(size, dtype=p.dtype)
                state[f"precond_{dim}"] = state.get(f"precond_{dim}", 0.1 * eye) + flat @ flat.T
                values, vectors = torch.linalg.eigh(state[f"precond_{dim}"])
                state[f"inv_precond_{dim}"] = vectors @ (values ** (-0.5 / p.ndim)).diag() @ vectors.T
                moved = step.movedim(dim, 0)
                step = (state[f"inv_precond_{dim}"] @ moved.reshape(size, -1)).view_as(moved).movedim(0, dim)
            p -= 1e-2 * step


Make = Callable[[nn.Module], torch.optim.Optimizer]

FOLLOW: dict[str, Make] = {
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters()),
    "rows": lambda m: Rows(m.parameters()),
    "shampoo": lambda m: Shampoo(m.parameters()),
    "nadam": lambda m: torch.optim.NAdam(m.parameters(), lr=1e-2),
    "radam": lambda m: torch.optim.RAdam(m.parameters(), lr=1e-2),
    "rprop": lambda m: torch.optim.Rprop(m.parameters(), lr=1e-2),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-2),
    "adadelta": lambda m: torch.optim.Adadelta(m.parameters()),
    "adamax": lambda m: torch.optim.Adamax(m.parameters(), lr=1e-2),
    "asgd": lambda m: torch.optim.ASGD(m.parameters(), lr=1e-2),
    "amsgrad": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2, amsgrad=True),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    def loss() -> Tensor:
        optimizer.zero_grad()
        target = torch.randn(12, 3, generator=generator(seed), dtype=torch.float64)
        value = F.mse_loss(model(X), target)
        value.backward()
        return value

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(loss)
    else:
        loss()
        optimizer.step()


def made(make: Make) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Network().double()
    return model, make(model)


@pytest.mark.parametrize("name", FOLLOW)
def test_a_step_after_permuting_is_the_permuted_step(name: str) -> None:
    """Reference: permute model and optimizer, then step = step, then permute. Nothing of the state is lost."""
    one, optimizer = made(FOLLOW[name])
    spec = derive_symmetry(one, (X,))
    p = random_permutations(spec, generator(3))
    assert any(not torch.equal(order, torch.arange(len(order))) for order in p.values())
    for seed in range(3):
        step(one, optimizer, seed)
    other, twin = made(FOLLOW[name])
    other.load_state_dict(permute_weights(one.state_dict(), spec, p))
    state = permute_optimizer(copy.deepcopy(optimizer.state_dict()), spec, p, dict(one.named_parameters()))
    assert state["state"].keys() == optimizer.state_dict()["state"].keys()
    twin.load_state_dict(state)
    step(one, optimizer, 5)
    step(other, twin, 5)
    expected = permute_weights(one.state_dict(), spec, p)
    for key, value in other.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("first", [0, 2])
def test_flat_vectors_of_all_parameters_begin_anew(first: int) -> None:
    """LBFGS keeps everything under its first parameter, whether that one moves or not: a fresh state is right, a
    stale one is not."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        held = list(model.parameters())
        return torch.optim.LBFGS(held[first:] + held[:first], max_iter=3)

    model, optimizer = made(make)
    names = dict(model.named_parameters())
    order = [*names][first:] + [*names][:first]
    spec = derive_symmetry(model, (X,))
    step(model, optimizer, 0)
    p = random_permutations(spec, generator(3))
    with pytest.warns(SymmetryWarning, match=r"of (first|square)\.weight cannot be permuted"):
        moved = permute_optimizer(optimizer.state_dict(), spec, p, {name: names[name] for name in order})
    assert moved["state"] == {}
    assert permute_optimizer(optimizer.state_dict(), spec, {}, {n: names[n] for n in order})["state"].keys() == {0}


@pytest.mark.parametrize(
    "entries",
    [
        {"state1": torch.zeros(SQUARE, SQUARE, dtype=torch.uint8), "absmax1": torch.zeros(SQUARE)},
        {"exp_avg": torch.zeros(SQUARE, SQUARE), "GG": [torch.zeros(SQUARE, SQUARE)] * 2},
        {"exp_avg": torch.zeros(SQUARE, SQUARE), "odd": torch.zeros(SQUARE)},
        {"exp_avg": torch.zeros(SQUARE, SQUARE), "basis": torch.eye(SQUARE * SQUARE)},
        {"exp_avg": torch.zeros(SQUARE, SQUARE), "precond_0": torch.eye(3)},
    ],
    ids=["codes", "eigenbases", "a vector of one of two axes", "a larger matrix", "another block"],
)
def test_what_is_not_known_is_not_guessed(entries: dict[str, Any]) -> None:
    """Reference: by hand. The whole state of that parameter begins anew, and the others' moves."""
    model, optimizer = made(lambda m: torch.optim.Adam(m.parameters()))
    step(model, optimizer, 0)
    spec = derive_symmetry(model, (X,))
    state = optimizer.state_dict()
    state["state"][2] = {"step": 1, **entries}
    p = random_permutations(spec, generator(3))
    with pytest.warns(SymmetryWarning, match=r"the optimizer's state of square\.weight cannot be permuted"):
        moved = permute_optimizer(state, spec, p, dict(model.named_parameters()))
    assert moved["state"].keys() == state["state"].keys() - {2}


def test_state_of_no_parameter_and_plain_values_stay() -> None:
    """Reference: the state before."""
    model, optimizer = made(lambda m: torch.optim.Adam(m.parameters()))
    step(model, optimizer, 0)
    spec = derive_symmetry(model, (X,))
    state = optimizer.state_dict()
    state["state"]["common"] = {"k": 3}
    state["state"][0] |= {"history": [1.0, 2.0], "norm": torch.tensor([3.0]), "none": None}
    moved = permute_optimizer(state, spec, random_permutations(spec, generator(3)), dict(model.named_parameters()))
    assert moved["state"]["common"] == {"k": 3}
    assert {key: moved["state"][0][key] for key in ("history", "norm", "none")} == {
        key: state["state"][0][key] for key in ("history", "norm", "none")
    }


@pytest.mark.parametrize("name", ["amsgrad", "adafactor"])
def test_names_alone_do_where_entries_show_the_shape(name: str) -> None:
    """Reference: the same with parameters beside the names."""
    model, optimizer = made(FOLLOW[name])
    step(model, optimizer, 0)
    spec = derive_symmetry(model, (X,))
    named = dict(model.named_parameters())
    p = random_permutations(spec, generator(3))
    one, other = (permute_optimizer(optimizer.state_dict(), spec, p, names)["state"] for names in (named, list(named)))
    assert all(torch.equal(value, other[i][key]) for i, held in one.items() for key, value in held.items())
    with pytest.raises(SymmetryError, match="pass names with their parameters"):
        permute_optimizer(optimizer.state_dict(), spec, p, [*named][::-1])
