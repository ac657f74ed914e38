"""Moments of a model's optimizers by name: read, replaced, adopted from another agent.

A moment is a tensor of real numbers in a parameter's state that has the parameter's shape (Adam's moments, momentum,
sums of squares), or the parameter's count of steps. Everything else in the state (Adafactor's rows and columns,
products of momenta, lists) is never exchanged. Names are those of `dimat.weights.moments`; for an optimizer inside or
beside another one, its number comes before the entry, "1:exp_avg".
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn

from dimat.device import own_streams, seeded_streams
from dimat.merge.moments import LIMIT, limit_of
from dimat.train.optimizer_state import Parameters, optimized
from dimat.weights.moments import STEP

_ENTRY = re.compile(r"\w+")

State = dict[Any, Any]
Optimizers = Sequence[torch.optim.Optimizer]


def read_moments(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """Return all moments by name: the optimizers' own tensors, on their devices; counts that are not tensors
    unchanged."""
    return {
        name: torch.tensor(float(value), dtype=torch.float64) if isinstance(value, Real) else value.detach()
        for name, _, _, value in _moments(model, optimizers)
    }


def write_moments(model: nn.Module, optimizers: Optimizers, moments: Mapping[str, Tensor]) -> None:
    """Load moments in place, one after the other; each of the optimizers' must be there."""
    for name, state, entry, value in list(_moments(model, optimizers)):
        if isinstance(value, Tensor):
            value.copy_(moments[name])
        else:
            state[entry] = type(value)(moments[name].item())


def kept_back(model: nn.Module, optimizers: Optimizers) -> list[str]:
    """Return the entries of the state that are not moments and grow with the model, in order of their names."""
    found: set[str] = set()
    for each in optimizers:
        for parameter in optimized(model, each).values():
            for entry, value in each.state.get(parameter, {}).items():
                if not _is_moment(entry, value, parameter) and any(t.numel() > 1 for t in _tensors(value)):
                    found.add(str(entry))
    return sorted(found)


def adopt_moments(model: nn.Module, optimizers: Optimizers, moments: Mapping[str, Tensor]) -> list[str]:
    """Let new optimizers continue with another agent's moments.

    Return the parameters that start with an empty state: their state is more than moments, or some moments are missing.
    """
    anew: list[str] = []
    given = {name.partition(".")[2] for name in moments}
    for number, each in enumerate(optimizers):
        before = f"{number}:" if number else ""
        for name, parameter in optimized(model, each).items():
            if name not in given:
                continue
            sample = sample_state(each, parameter) or {}
            wanted = {entry: f"{before}{entry}.{name}" for entry in sample}
            whole = all(_is_moment(entry, value, parameter) for entry, value in sample.items())
            if not whole or not sample or any(full not in moments for full in wanted.values()):
                anew.append(name)
                continue
            for entry, full in wanted.items():
                value, adopted = sample[entry], moments[full]
                if isinstance(value, Tensor):
                    sample[entry] = value.copy_(adopted)
                else:
                    sample[entry] = type(value)(adopted.item())
            each.state[parameter] = sample
    return anew


def sample_moments(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """Return tensors with the names and shapes of the moments after each optimizer's first step.

    If that cannot be determined, as many as Adam has, under names at least as long.
    """
    found: dict[str, Tensor] = {}
    for number, each in enumerate(optimizers):
        before = f"{number}:" if number else ""
        for name, parameter in optimized(model, each).items():
            if not parameter.requires_grad:
                continue
            state = sample_state(each, parameter)
            entries = ["momentum_buffer_1", "momentum_buffer_2", STEP]
            if state is not None:
                entries = [entry for entry, value in state.items() if _is_moment(entry, value, parameter)]
            for entry in entries:
                found[f"{before}{entry}.{name}"] = torch.zeros(() if entry == STEP else parameter.shape)
    return found


def sample_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> State | None:
    """Return the state of such a parameter in an optimizer of this kind after a step with zero gradient.

    None if that cannot be determined.
    """
    groups = (g for g in optimizer.param_groups if any(parameter is held for held in g["params"]))
    group = {key: value for key, value in next(groups, optimizer.defaults).items() if key != "params"}
    probe = nn.Parameter(torch.zeros_like(parameter, memory_format=torch.preserve_format))
    probe.grad = torch.zeros_like(probe)
    try:
        with own_streams(seeded_streams(0, parameter.device), parameter.device):
            twin = type(optimizer)([{**group, "params": [probe]}], **_arguments(optimizer))
            twin.step()
        held = dict(twin.state.get(probe, {}))
    except Exception:  # a class of a user's may raise anything, where it wants a closure or more than groups
        return None
    return {key: value for key, value in held.items() if value is not None}


def limit_of_momenta(optimizers: Optimizers) -> float:
    """Return the largest ratio of a first moment to the root of its second moment, from the groups' decays."""
    limits: list[float] = []
    for each in optimizers:
        for group in each.param_groups:
            betas: Any = group.get("betas")
            if isinstance(betas, tuple | list) and len(pair := cast("list[Any]", list(betas))) == 2:
                limits.append(limit_of((float(pair[0]), float(pair[1]))))
    return max(limits, default=LIMIT)


def _arguments(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the defaults of an optimizer that its class accepts; AdamW has one that it does not."""
    named = inspect.signature(type(optimizer)).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in named.values())
    return {key: value for key, value in optimizer.defaults.items() if takes_all or key in named}


def _moments(model: nn.Module, optimizers: Optimizers) -> Iterator[tuple[str, State, str, Any]]:
    """Yield the name of each moment, its state and entry, and its value."""
    for number, each in enumerate(optimizers):
        before = f"{number}:" if number else ""
        parameters: Parameters = optimized(model, each)
        for name, parameter in parameters.items():
            state = cast("State", each.state.get(parameter, {}))
            for entry, value in state.items():
                if _is_moment(entry, value, parameter):
                    yield f"{before}{entry}.{name}", state, entry, value


def _is_moment(entry: Any, value: Any, parameter: nn.Parameter) -> bool:
    if not isinstance(entry, str) or not _ENTRY.fullmatch(entry):
        return False
    if not isinstance(value, Tensor):
        return entry == STEP and isinstance(value, int | float) and not isinstance(value, bool)
    if entry == STEP:
        return value.numel() == 1
    plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
    return plain and value.is_floating_point() and value.shape == parameter.shape


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in cast("list[Any] | tuple[Any, ...]", value):
            yield from _tensors(each)
