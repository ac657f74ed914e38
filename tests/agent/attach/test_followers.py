"""What follows a model. Reference: the outputs of copies, which a change of basis leaves as they are."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dimat.agent.attach.followers import Move
from dimat.agent.attach.part import Part
from dimat.agent.attach.trainer import AttachedTrainer
from dimat.errors import ConfigError, DataError
from dimat.symmetry import SymmetrySpec, derive_symmetry, random_permutations

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def perturbed(model: nn.Module) -> nn.Module:
    """A copy with other weights, as a running mean has."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.rand_like(parameter)
    return other.eval()


def setup(follow: Any) -> tuple[nn.Module, AttachedTrainer, SymmetrySpec]:
    torch.manual_seed(0)
    model = network()
    made = follow(model) if callable(follow) else follow
    trainer = AttachedTrainer(model, torch.optim.SGD(model.parameters(), 0.1), 1, None, Part(), follow=made)
    return model, trainer, derive_symmetry(model, (X,))


def permuted(trainer: AttachedTrainer, spec: SymmetrySpec) -> None:
    p = random_permutations(spec, torch.Generator().manual_seed(1))
    assert not torch.equal(next(iter(p.values())), torch.arange(6))
    trainer.permute(spec, p)


def test_copies_go_along_into_another_basis() -> None:
    """A module, torch's averaged model, a table, and a function that moves its own; each is permuted as the model is,
    which `model − copy` shows: it is the difference before, permuted."""
    kept: dict[str, Any] = {}

    def follow(model: nn.Module) -> list[Any]:
        kept["module"] = perturbed(model)
        kept["averaged"] = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True).eval()
        kept["table"] = {name: p.detach() + 1 for name, p in model.named_parameters()}
        kept["own"] = {name: p.detach() + 2 for name, p in model.named_parameters()}

        def moved(move: Move) -> None:
            kept["own"] = move(kept["own"])

        return [kept["module"], kept["averaged"], kept["table"], moved]

    model, trainer, spec = setup(follow)
    before = kept["module"](X)
    averaged = kept["averaged"](X)
    permuted(trainer, spec)
    torch.testing.assert_close(kept["module"](X), before)
    torch.testing.assert_close(kept["averaged"](X), averaged)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(kept["table"][name], parameter.detach() + 1)
        torch.testing.assert_close(kept["own"][name], parameter.detach() + 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.followers.warn()
    weights = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    trainer.start_from(weights)
    assert not any(tensor.any() for tensor in kept["module"].state_dict().values())
    assert not any(tensor.any() for tensor in (*kept["table"].values(), *kept["own"].values()))


def test_a_second_optimizer_goes_along() -> None:
    """Reference: its moment moved as the parameter that it is of."""
    torch.manual_seed(0)
    model = network()
    first = torch.optim.SGD(model[3].parameters(), 0.1)
    second = torch.optim.Adam(model[0].parameters(), 0.1)
    trainer = AttachedTrainer(model, first, 1, None, Part(), follow=[second])
    model(X).sum().backward()
    second.step()
    with torch.no_grad():
        second.state[model[0].weight]["exp_avg"].copy_(model[0].weight)
    permuted(trainer, derive_symmetry(model, (X,)))
    assert torch.equal(second.state[model[0].weight]["exp_avg"], model[0].weight)


def test_the_state_of_a_second_optimizer_is_kept() -> None:
    """Reference: torch's own state after the same steps. What a checkpoint knows of others is no hindrance, and one of
    another class is refused."""

    def made(kind: Any = torch.optim.Adam) -> tuple[nn.Module, torch.optim.Optimizer, AttachedTrainer]:
        torch.manual_seed(0)
        model = network()
        first = torch.optim.SGD(model[3].parameters(), 0.1, momentum=0.9)
        second = kind(model[0].parameters(), 0.1)
        follow = [] if kind is torch.optim.SGD else [second, first]  # the first one is counted once
        return model, second, AttachedTrainer(model, first, 1, None, Part(), follow=follow)

    model, second, trainer = made()
    model(X).sum().backward()
    trainer.optimizer.step()
    second.step()
    held = trainer.state()
    assert held.values["optimizers"] == "SGD Adam"
    again, other, resumed = made()
    resumed.load_state(held)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(other.state[again[0].weight][name], second.state[model[0].weight][name])
    moment = resumed.optimizer.state[again[3].weight]["momentum_buffer"]
    assert torch.equal(moment, trainer.optimizer.state[model[3].weight]["momentum_buffer"])
    weights = {name: torch.zeros_like(tensor) for name, tensor in again.state_dict().items()}
    resumed.start_from(weights)
    assert not other.state
    _, _, alone = made(torch.optim.SGD)
    alone.load_state(held)  # it follows no more
    again, other, resumed = made()
    resumed.load_state(alone.state())  # it is new
    assert not other.state
    _, _, changed = made(torch.optim.RMSprop)
    with pytest.raises(DataError, match="optimizer 2 is 'Adam', this one is 'RMSprop'"):
        changed.load_state(held)


def test_a_warning_says_once_that_copies_must_follow() -> None:
    """Nobody has said whether there are any; nothing is due while nothing moves, and not where there are none."""
    _, trainer, spec = setup(None)
    trainer.permute(spec, {})
    trainer.followers.warn()
    permuted(trainer, spec)
    with pytest.warns(UserWarning, match=r"Copies of it that you keep .* follow=\[\] if there are none"):
        trainer.followers.warn()
    permuted(trainer, spec)
    trainer.followers.warn()
    _, trainer, spec = setup([])
    permuted(trainer, spec)
    trainer.followers.warn()


def test_what_does_not_fit_the_model_is_refused() -> None:
    other = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    stranger = torch.optim.SGD(other.parameters(), 0.1)
    table: dict[str, Tensor] = {"0.wieght": torch.zeros(6, 4)}
    for each, message in (
        (other, r"'3\.weight' of Sequential has shape \(2, 6\), the model's \(3, 6\)"),
        (table, r"a table has '0\.wieght', which the model does not have; did you mean '0\.weight'"),
        (stranger, "2 parameters that are not the model's|parameters that are not the model's"),
        (3, "a int cannot follow the model"),
    ):
        with pytest.raises(ConfigError, match=message):
            setup([each])
