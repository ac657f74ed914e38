"""Moments of real optimizers: read, merged, replaced, taken over. References: torch's own state, training itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from dimat.merge.moments import MergedMoments, PeerMoments, check_moments, norms_of_moments, reference_of
from dimat.train.moments import (
    adopt_moments,
    kept_back,
    limit_of_momenta,
    read_moments,
    sample_moments,
    write_moments,
)
from dimat.train.optimizer_state import family
from dimat.weights.moments import encode_moments

OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.01, "momentum": 0.9},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adam": {"amsgrad": True},
}
DENSE = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer and name != "SparseAdam"
)
"""All optimizers of torch; SparseAdam takes no dense gradients, and has Adam's moments."""
NONE_OF_ITS_OWN = {"LBFGS"}
"""What it keeps is of all parameters together."""
IN_PART = {"Adafactor", "NAdam", "ASGD", "LBFGS"}
"""Whose state is more than moments: an agent cannot go on with another's."""


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(30, 50, bias=False), nn.Tanh(), nn.Linear(50, 4, bias=False))


def optimizer_of(name: str, model: nn.Module) -> Optimizer:
    return getattr(torch.optim, name)(model.parameters(), **OPTIONS.get(name, {}))


def stepped(name: str, seed: int, steps: int = 5) -> tuple[nn.Sequential, Optimizer]:
    model = network()
    optimizer = optimizer_of(name, model)
    train(model, optimizer, seed, steps)
    return model, optimizer


def train(model: nn.Module, optimizer: Optimizer, seed: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        inputs = torch.randn(16, 30, generator=generator)

        def closure(inputs: Tensor = inputs) -> Tensor:
            optimizer.zero_grad()
            loss = (model(inputs) - inputs[:, :4].sin()).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def merged_with(own: tuple[nn.Module, Optimizer], other: tuple[nn.Module, Optimizer], encoding: str) -> MergedMoments:
    mine, sent = read_moments(own[0], [own[1]]), encode_moments(read_moments(other[0], [other[1]]), encoding)
    check_moments("lab-b", sent, own[0].state_dict(), mine)
    bound = reference_of(norms_of_moments(mine), mine)
    return MergedMoments(
        mine,
        0.5,
        [PeerMoments("lab-b", 0.5, sent)],
        None,
        bound,
        ratio=10.0,
        limit=limit_of_momenta([own[1]]),
    )


@pytest.mark.parametrize("name", DENSE)
def test_moments_of_every_optimizer_of_torch(name: str) -> None:
    """Each can be read, sent, checked, merged and put back, and training goes on with finite weights; of equal agents
    the merge is what they had. What is no moment is untouched."""
    model, optimizer = stepped(name, 1)
    moments = read_moments(model, [optimizer])
    assert bool(moments) != (name in NONE_OF_ITS_OWN)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    same = merged_with((model, optimizer), stepped(name, 1), "fp32")
    write_moments(model, [optimizer], same)
    torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=1e-5, atol=1e-9)
    mixed = merged_with((model, optimizer), stepped(name, 2), "int8")
    expected = {entry: tensor.clone() for entry, tensor in mixed.items()}
    write_moments(model, [optimizer], mixed)
    now = read_moments(model, [optimizer])
    assert all(torch.equal(now[entry], tensor) for entry, tensor in expected.items())
    train(model, optimizer, 3, 5)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("name", DENSE)
def test_a_newcomer_goes_on_with_anothers_moments(name: str) -> None:
    """With the weights and moments of an agent a newcomer trains bit for bit as that agent would; where the state is
    more than moments, or cannot be told, it begins anew and says for which parameters."""
    model, optimizer = stepped(name, 1)
    young = copy.deepcopy(model)
    fresh = optimizer_of(name, young)
    anew = adopt_moments(young, [fresh], read_moments(model, [optimizer]))
    if name in IN_PART:
        assert anew == ([] if name in NONE_OF_ITS_OWN else ["0.weight", "2.weight"])
        assert not fresh.state
        return
    assert anew == []
    for each, its in ((model, optimizer), (young, fresh)):
        train(each, its, 4, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), young.parameters(), strict=True))


@pytest.mark.parametrize("name", [name for name in DENSE if name not in NONE_OF_ITS_OWN])
def test_names_and_shapes_are_known_before_the_first_step(name: str) -> None:
    """So that bytes can be told before anything is trained."""
    model, optimizer = stepped(name, 1)
    young = network()
    sample = sample_moments(young, [optimizer_of(name, young)])
    found = read_moments(model, [optimizer])
    assert {entry: tensor.shape for entry, tensor in sample.items()} == {e: t.shape for e, t in found.items()}


def test_an_optimizer_that_cannot_be_told_is_taken_to_have_two_moments() -> None:
    """LBFGS wants a closure; the estimate is an upper bound."""
    young = network()
    sample = sample_moments(young, [optimizer_of("LBFGS", young)])
    assert sum(tensor.numel() for tensor in sample.values() if tensor.ndim) == 2 * (30 * 50 + 50 * 4)


def test_what_is_kept_back_is_named() -> None:
    """Adafactor's rows and columns; none of Adam."""
    for name, entries in (("Adafactor", ["col_var", "row_var"]), ("AdamW", [])):
        model, optimizer = stepped(name, 1)
        assert kept_back(model, [optimizer]) == entries


class Counting(Optimizer):
    """Counts its steps in a plain number, as transformers' optimizers do."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                state.setdefault("exp_avg", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                p.sub_(state["exp_avg"], alpha=group["lr"])


def test_counts_that_are_plain_numbers() -> None:
    """They stay integers, in a merge and where a newcomer takes them over."""
    pairs: list[tuple[nn.Module, Optimizer]] = []
    for steps in (3, 5):
        model = network()
        optimizer = Counting(model.parameters())
        train(model, optimizer, steps, steps)
        pairs.append((model, optimizer))
    write_moments(pairs[0][0], [pairs[0][1]], merged_with(pairs[0], pairs[1], "int8"))
    assert [state["step"] for state in pairs[0][1].state.values()] == [4, 4]
    young = network()
    fresh = Counting(young.parameters())
    assert adopt_moments(young, [fresh], read_moments(pairs[0][0], [pairs[0][1]])) == []
    assert [type(state["step"]) for state in fresh.state.values()] == [int, int]


class Around(Optimizer):
    """An optimizer around another one, with a state of its own, as Lookahead is."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})

    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", p.detach().clone())
                slow.lerp_(p.detach(), 0.5)
        return loss


def test_an_optimizer_inside_another_one() -> None:
    """Moments of both travel, and are put back where they were."""
    model = network()
    around = Around(torch.optim.Adam(model.parameters()))
    train(model, around, 1, 3)
    moments = read_moments(model, family(around))
    assert {name.partition(".")[0] for name in moments} == {"slow", "1:exp_avg", "1:exp_avg_sq", "1:step"}
    write_moments(model, family(around), {name: tensor * 2 for name, tensor in moments.items()})
    first = next(iter(model.parameters()))
    assert float(around.inner.state[first]["step"]) == 6
    assert around.inner.state[first]["exp_avg"] is not None
    check_moments("lab-b", encode_moments(moments, "int8"), model.state_dict(), moments)


def test_limits_by_the_groups_decays() -> None:
    """The largest of all groups; ten where the optimizer has no pair of decays."""
    model = network()
    assert limit_of_momenta([torch.optim.Adam(model.parameters(), betas=(0.5, 0.999))]) == pytest.approx(18.27, abs=0.1)
    assert limit_of_momenta([torch.optim.SGD(model.parameters(), lr=0.1)]) == 10.0
