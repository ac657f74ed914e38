"""Copies and optimizers that follow a user's model when its units move.

A running mean of weights (EMA, SWA), a target network or a teacher has the model's units at the same positions. When an
agent puts its units in the network's order, or adopts another agent's weights, these must change with the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from dimat.errors import ConfigError, nearest
from dimat.symmetry import Permutations, SymmetrySpec, permute_weights
from dimat.symmetry.permute import identity
from dimat.symmetry.trace import forget_derived
from dimat.train.optimizer_state import optimized

Move = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Returns tensors, by the model's names, as they are after the model has changed."""
Follower = nn.Module | torch.optim.Optimizer | Mapping[str, Tensor] | Callable[[Move], None]


class Followers:
    """Everything that follows `model`: modules and tables of tensors by the model's names, optimizers, and functions
    that are called with a `Move`.

    None: the user has not said whether there are any, and is warned once when the model's units have moved. Raises
    ConfigError for objects that do not fit the model.
    """

    def __init__(self, model: nn.Module, follow: Iterable[Follower] | None) -> None:
        self._told = follow is not None
        self._due = ""
        self._tables: list[Mapping[str, Tensor]] = []
        self._modules: list[nn.Module] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        """Other optimizers of the model, whose state the trainer moves and keeps as the first one's."""
        self._functions: list[Callable[[Move], None]] = []
        for each in follow or ():
            self._take(model, each)

    def moving(self, spec: SymmetrySpec, permutations: Permutations) -> Callable[[], None]:
        """Return a function that moves all but optimizers as the model is moved; nothing changes before its call."""
        tables = self._held()
        moved = [permute_weights(table, spec, permutations, strict=False) for table in tables]
        still = all(torch.equal(p.cpu().long(), identity(p.shape)) for p in permutations.values())

        def apply() -> None:
            _fill(tables, moved)
            for function in self._functions:
                function(lambda tensors: permute_weights(tensors, spec, permutations, strict=False))
            self._changed("the model's units were put in the network's order", bool(still))

        return apply

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Set all but optimizers to the state of a model that starts with these weights."""
        tables = self._held()
        _fill(tables, [{name: weights.get(name, tensor) for name, tensor in table.items()} for table in tables])
        for function in self._functions:
            function(lambda tensors: {name: weights.get(name, tensor) for name, tensor in tensors.items()})
        self._changed("the model started again from a neighbour's weights", False)

    def warn(self) -> None:
        """Give due warnings, in the user's own thread."""
        due, self._due = self._due, ""
        if due:
            warnings.warn(due, stacklevel=3)

    def _changed(self, how: str, still: bool) -> None:
        for module in self._modules:
            forget_derived(module)
        if self._told or still:
            return
        self._told = True
        self._due = (
            f"{how}. Copies of it that you keep (a running mean, a target network) and other optimizers of it must "
            "follow: give them as attach(…, follow=[…]), or follow=[] if there are none"
        )

    def _take(self, model: nn.Module, given: Follower) -> None:
        if isinstance(given, torch.optim.swa_utils.AveragedModel):
            given = given.module
        if isinstance(given, nn.Module):
            self._modules.append(given)
            _check(model, given.state_dict(keep_vars=True), type(given).__name__)
        elif isinstance(given, torch.optim.Optimizer):
            optimized(model, given)
            self.optimizers.append(given)
        elif isinstance(given, Mapping):
            table = cast("Mapping[str, Tensor]", given)
            _check(model, table, "a table")
            self._tables.append(table)
        elif callable(given):
            self._functions.append(given)
        else:
            raise ConfigError(
                f"follow: a {type(given).__name__} cannot follow the model; give modules, tables of tensors by the "
                "model's names, optimizers, or functions that are called with what moves such a table"
            )

    def _held(self) -> list[Mapping[str, Tensor]]:
        return [*self._tables, *(module.state_dict(keep_vars=True) for module in self._modules)]


def _check(model: nn.Module, table: Mapping[str, Tensor], what: str) -> None:
    own = model.state_dict(keep_vars=True)
    for name, tensor in table.items():
        if name not in own:
            raise ConfigError(f"follow: {what} has {name!r}, which the model does not have{nearest(name, own)}")
        if tensor.shape != own[name].shape:
            raise ConfigError(
                f"follow: {name!r} of {what} has shape {tuple(tensor.shape)}, the model's {tuple(own[name].shape)}"
            )


@torch.no_grad()
def _fill(tables: Iterable[Mapping[str, Tensor]], values: Iterable[Mapping[str, Tensor]]) -> None:
    for table, filled in zip(tables, values, strict=True):
        for name, tensor in table.items():
            if filled[name] is not tensor:
                tensor.copy_(filled[name])
