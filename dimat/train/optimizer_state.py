"""The state of any optimizer as tensors and text by name: read, put back, moved in place.

It relies on torch's view of the state: values of any kind, by parameter and by an entry's name. Objects keep their
identity: the optimizer's groups, its state, and the tensors in it that are moved.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dimat.errors import ConfigError, DataError
from dimat.symmetry import Permutations, SymmetrySpec
from dimat.symmetry.moments import begun_anew, move_state

PREFIX = "optimizer/"
"""Prefix of tensors' names; for an optimizer inside or beside another one `optimizer/1:`, `optimizer/2:`, …"""
PLAIN = "plain"
"""Name, after the prefix, of the text with the state's other values: JSON, by parameter and entry."""
GROUPS = "groups"
"""Name, after the prefix, of the text with the groups' values that the optimizer has changed: JSON, by group."""
NO_PARAMETER = ""
"""The name for state that belongs to no parameter."""
INSIDE = re.compile(rf"{PREFIX}\d+:")
"""Prefix of the name of an optimizer inside or beside another one."""
USERS = frozenset(("lr", "initial_lr", "params"))
"""Entries of groups that are set anew at every start."""

Parameters = Mapping[str, nn.Parameter]


def family(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return an optimizer and the optimizers inside it that have their own state, as in Lookahead and SAM."""
    found = [optimizer]
    held: list[Any] = []
    for value in vars(optimizer).values():
        held += cast("Sequence[Any]", value) if isinstance(value, list | tuple) else [value]
    for value in held:
        if isinstance(value, torch.optim.Optimizer) and value.state is not optimizer.state:
            found += [each for each in family(value) if not any(each is other for other in found)]
    return found


def prefix(number: int) -> str:
    """Return the prefix of the names of the state of one of a family."""
    return f"{PREFIX}{number}:" if number else PREFIX


def optimized(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Return the parameters that the optimizer changes, by name, in its order; ConfigError if one is not the
    model's."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    strangers = sum(parameter not in names for parameter in held)
    if strangers:
        raise ConfigError(f"the optimizer holds {strangers} parameters that are not the model's; give it its own")
    return {names[parameter]: parameter for parameter in held}


def group_values(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the numbers in the optimizer's groups except learning rates, which are set anew at every start."""
    return [
        {key: value for key, value in group.items() if key not in USERS and isinstance(value, bool | int | float)}
        for group in optimizer.param_groups
    ]


def read_state(
    optimizer: torch.optim.Optimizer,
    parameters: Parameters,
    began: Sequence[Mapping[str, Any]],
    number: int = 0,
    *,
    copy: bool = True,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state as tensors named `optimizer/<parameter>/<entry>` on the CPU, and the rest as text.

    `began`: the groups' initial values (`group_values`); `number`: in its family; `copy`: if false, tensors on the CPU
    are the optimizer's own. ConfigError for a value that a checkpoint cannot store.
    """
    take = copied if copy else on_cpu
    names = {parameter: name for name, parameter in parameters.items()}
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for owner, held in cast("dict[Any, Any]", optimizer.state).items():
        name = names.get(cast("nn.Parameter", owner), NO_PARAMETER) if isinstance(owner, Tensor) else NO_PARAMETER
        entries: Mapping[Any, Any] = held if isinstance(owner, Tensor) else {owner: held}
        for key, value in entries.items():
            packed = _packed(value, f"{prefix(number)}{name}/{key}", tensors, take)
            if not isinstance(value, Tensor) or "/" in str(key) or name == NO_PARAMETER:
                plain.setdefault(name, {})[str(key)] = packed
    groups = group_values(optimizer)
    changed = [  # a group that was added since then is as its user made it
        {key: value for key, value in now.items() if key not in before or before[key] != value}
        for now, before in zip(groups, [*began, *groups[len(began) :]])
    ]
    texts = {prefix(number) + PLAIN: json.dumps(plain)} if plain else {}
    return tensors, texts | ({prefix(number) + GROUPS: json.dumps(changed)} if any(changed) else {})


def write_state(
    optimizer: torch.optim.Optimizer,
    parameters: Parameters,
    tensors: Mapping[str, Tensor],
    texts: Mapping[str, Any],
    number: int = 0,
) -> None:
    """Restore the state that `read_state` read. DataError if it is of a parameter that the optimizer does not have."""
    start = prefix(number)
    plain = cast("dict[str, dict[str, Any]]", json.loads(texts.get(start + PLAIN, "{}")))
    used: set[str] = set()
    entries = {name: {key: _unpacked(v, tensors, used) for key, v in held.items()} for name, held in plain.items()}
    for full, tensor in tensors.items():
        name, _, key = full.removeprefix(start).rpartition("/")
        inside = INSIDE.match(full)
        if full not in used and (inside[0] if inside else PREFIX) == start:
            entries.setdefault(name, {})[key] = tensor.clone()
    order = list(parameters)
    state: dict[Any, Any] = entries.pop(NO_PARAMETER, {})
    for name, held in entries.items():
        if name not in parameters:
            raise DataError(f"the state has optimizer entries of {name!r}, which is no trained parameter here")
        state[order.index(name)] = held
    groups, own = optimizer.param_groups, optimizer.state
    try:
        _plainly(optimizer).load_state_dict({**_plainly(optimizer).state_dict(), "state": state})
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise DataError(f"{type(optimizer).__name__} cannot continue from its state: {first}") from error
    loaded = dict(optimizer.state)
    own.clear()
    own.update(loaded)
    optimizer.state, optimizer.param_groups = own, groups  # whoever holds them still does
    for name, held in entries.items():
        mine = own[parameters[name]]
        for key, stored in held.items():  # torch casts to the parameter's type, also what was wider
            if isinstance(stored, Tensor) and stored.is_floating_point() and mine[key].dtype != stored.dtype:
                mine[key] = stored.to(mine[key].device)
    for group, values in zip(groups, json.loads(texts.get(start + GROUPS, "[]"))):
        group.update(values)


def move(
    optimizer: torch.optim.Optimizer, parameters: Parameters, spec: SymmetrySpec, permutations: Permutations
) -> tuple[Callable[[], None], str]:
    """Return a function that moves the state in place, as the parameters are moved, and a note for the operator.

    Nothing is changed before it is called; SymmetryError if the permutations do not fit.
    """
    moved, anew = move_state(_plainly(optimizer).state_dict(), spec, permutations, parameters)

    def apply() -> None:
        for number, (name, parameter) in enumerate(parameters.items()):
            new = moved["state"].get(number)
            if name in anew or new is None:
                optimizer.state.pop(parameter, None)  # it has none, or that of one of its list which has none
                continue
            held = optimizer.state[parameter]
            for key in [key for key in held if key not in new]:
                del held[key]
            for key, value in new.items():
                mine = held.get(key)
                if isinstance(value, Tensor) and isinstance(mine, Tensor) and mine.shape == value.shape:
                    if mine is not value:
                        mine.copy_(value)
                else:
                    held[key] = value

    return apply, begun_anew(anew) if anew else ""


class _Plainly:
    """An optimizer with torch's methods to read and load its state, for one that has another inside: such wrappers
    override these methods, for both at once."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return torch.optim.Optimizer.state_dict(self._optimizer)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.load_state_dict(self._optimizer, state)


def _plainly(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer | _Plainly:
    return optimizer if len(family(optimizer)) == 1 else _Plainly(optimizer)


def copied(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def on_cpu(tensor: Tensor) -> Tensor:
    """Return a tensor itself if it is on the CPU, else a copy there."""
    return tensor.detach().to("cpu")


def _packed(value: Any, name: str, tensors: dict[str, Tensor], take: Callable[[Tensor], Tensor]) -> Any:
    """Return a value for JSON, with its tensors by name; these are added to `tensors`."""
    if isinstance(value, Tensor) and value.layout == torch.strided and type(value) in (Tensor, nn.Parameter):
        tensors[name] = take(value)
        return {"tensor": name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        each = [_packed(v, f"{name}/{i}", tensors, take) for i, v in enumerate(cast("Sequence[Any]", value))]
        return {"tuple" if isinstance(value, tuple) else "list": each}
    if isinstance(value, Mapping):
        held = cast("Mapping[Any, Any]", value)
        return {"dict": {str(key): _packed(v, f"{name}/{key}", tensors, take) for key, v in held.items()}}
    raise ConfigError(
        f"the optimizer keeps a {type(value).__name__} in its state ({name}), which a checkpoint cannot store; "
        'set train.optimizer_state = "fresh", or take another optimizer'
    )


def _unpacked(value: Any, tensors: Mapping[str, Tensor], used: set[str]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, held),) = cast("dict[str, Any]", value).items()
    if kind == "tensor":
        used.add(held)
        if held not in tensors:
            raise DataError(f"the state lacks {held!r}")
        return tensors[held].clone()
    if kind == "dict":
        return {key: _unpacked(v, tensors, used) for key, v in held.items()}
    return (tuple if kind == "tuple" else list)(_unpacked(v, tensors, used) for v in held)
