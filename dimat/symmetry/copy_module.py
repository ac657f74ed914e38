"""A deep copy of a user's module, whatever its attributes hold."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_OF_MODULE = frozenset(vars(nn.Module()))
"""Attributes that every module has: parameters, buffers, submodules, hooks."""


class _ComputedTensors(TorchFunctionMode):
    """Copies tensors that were computed with a gradient, which torch refuses to copy: as values, without their
    graph."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def copy_module(model: nn.Module, shared: Mapping[int, Any] | None = None) -> nn.Module:
    """Return a deep copy of a module, even if `copy.deepcopy` fails.

    A tensor that a forward pass or a hook left in any attribute or container (an auxiliary loss, the weight of old
    weight norm, pruning) is copied by value. An attribute that cannot be copied at all (a lock, an open file, a
    generator) is shared with the copy. `shared`: objects by id that the copy shares.
    """
    with _ComputedTensors():
        try:
            return copy.deepcopy(model, dict(shared or {}))
        except Exception:  # what a user's attribute raises; it is found below, or raises again
            return copy.deepcopy(model, dict(shared or {}) | _uncopyable(model))


def _uncopyable(model: nn.Module) -> dict[int, Any]:
    """Return, by id, the attributes and hooks of a module and its submodules that cannot be copied."""
    modules = {id(module): module for module in model.modules()}
    found: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            held = [value] if name not in _OF_MODULE else [*value.values()] if name.endswith("_hooks") else []
            for each in held:
                if not _copies(each, modules):
                    found[id(each)] = each
    return found


def _copies(value: Any, modules: Mapping[int, Any]) -> bool:
    duplicate: Callable[[Any, dict[int, Any]], Any] = copy.deepcopy
    try:
        duplicate(value, dict(modules))  # a reference to the model itself is no copy of it
    except Exception:  # objects say in any way that they cannot be copied
        return False
    return True
