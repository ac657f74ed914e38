"""The state of any optimizer in another order of units.

State that is known to follow its parameter is permuted, other state is reset. Known are entries of the parameter's
shape (momentum, Adam's moments), the same with some axes reduced to 1 (Adafactor's rows and columns in torch, SM3),
rows and columns without the reduced axis (`…_row`, `…_col`: Adafactor in transformers, CAME), square blocks of one axis
(`precond_i`, `inv_precond_i`: Shampoo), and values of one element. Codes of a quantised state, eigenbases, flat vectors
of all parameters (LBFGS) and others cannot be recognised by their shape. If a parameter has such an entry, its whole
state is left out, and its optimizer starts it again.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, cast

from torch import Tensor, nn

from dimat.errors import SymmetryError
from dimat.symmetry.permute import CheckedPermutations, Permutations, by_tensor, from_list, permute_tensor
from dimat.symmetry.spec import AxisRef, SymmetrySpec
from dimat.symmetry.stacks import stacked
from dimat.symmetry.trace import SymmetryWarning

BLOCK = re.compile(r"(?:inv_)?precond(?:itioner)?_(\d+)")
"""Names of square blocks in Shampoo and similar optimizers, with the axis of the parameter to which they belong."""

Shape = tuple[int, ...]


def permute_optimizer(
    optimizer_state: Mapping[str, Any],
    spec: SymmetrySpec,
    permutations: Permutations,
    names: Sequence[str] | Mapping[str, Tensor],
) -> dict[str, Any]:
    """Return a torch `optimizer.state_dict()` whose state is permuted like the parameters.

    `names`: the parameters' state-dict names in the order in which the optimizer holds them, with the parameters:
    `dict(model.named_parameters())`. Names alone suffice if each parameter with a state has an entry of its own shape.
    The module's docstring says what moves; numbers, tensors of one element and hyper-parameters are kept, as is state
    that belongs to no parameter. The input is untouched; tensors that nothing moves are not copied.

    Parameters whose state cannot be moved are left out of the result, with a `SymmetryWarning` that names them. Raises
    SymmetryError if names do not fit the state.
    """
    moved, anew = move_state(optimizer_state, spec, permutations, names)
    if anew:
        warnings.warn(begun_anew(anew), SymmetryWarning, stacklevel=2)
    return moved


def begun_anew(names: Sequence[str]) -> str:
    """Return a line saying that the optimizer's state of these parameters could not be moved."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"the optimizer's state of {', '.join(names[:3])}{more} cannot be permuted with the units, "
        "as its relation to the parameter is not known; it is reset"
    )


def move_state(
    optimizer_state: Mapping[str, Any],
    spec: SymmetrySpec,
    permutations: Permutations,
    names: Sequence[str] | Mapping[str, Tensor],
) -> tuple[dict[str, Any], list[str]]:
    """Do the same as `permute_optimizer`; also return the parameters whose state is left out."""
    moves = CheckedPermutations.of(spec, permutations)
    axes_of = by_tensor(spec)
    first = {name: tied[0] for tied in spec.tied for name in tied}
    numbers = [number for group in optimizer_state["param_groups"] for number in group["params"]]
    listed = list(names)
    if len(listed) != len(numbers):
        raise SymmetryError(f"{len(listed)} parameter names for an optimizer of {len(numbers)} parameters")
    name_of = dict(zip(numbers, listed))
    shapes = {name: tuple(tensor.shape) for name, tensor in names.items()} if isinstance(names, Mapping) else None
    stacks = stacked(spec)
    number_of = {name: number for number, name in name_of.items()}
    states = cast("Mapping[Any, Any]", optimizer_state["state"])
    state: dict[Any, Any] = {}
    anew: list[str] = []
    for number in dict.fromkeys((*states, *(number_of[name] for name in stacks if name in number_of))):
        if isinstance(number, int) and number not in name_of:
            raise SymmetryError(f"optimizer state {number!r} belongs to no parameter of its groups")
        name = source = name_of.get(number, "")
        axes, inside = axes_of.get(first.get(name, name), []), moves
        if name in stacks:
            source, axes, inside = from_list(stacks[name], name, axes_of, moves)
        origin = number_of.get(source, number)
        if origin not in states:
            continue  # the parameter that comes to this place has none either
        entries = states[origin]
        if number not in name_of or not isinstance(entries, Mapping):
            state[number] = entries
            continue
        held = cast("Mapping[str, Any]", entries)
        shape = _shape_by(axes, held, name) if shapes is None else shapes[name]
        moved = _moved(held, axes, shape, inside)
        if moved is not None and source != name:
            moved = {key: _apart(value) for key, value in moved.items()}
        if moved is None:
            anew.append(name)
        else:
            state[number] = moved
    return {**optimizer_state, "state": state}, anew


def _shape_by(axes: Sequence[AxisRef], entries: Mapping[str, Any], name: str) -> Shape | None:
    """Return the shape of a parameter from the entries of its state with the most axes."""
    large = {key: value for key, value in entries.items() if isinstance(value, Tensor) and value.numel() > 1}
    if not large:
        return None
    rank = max(value.ndim for value in large.values())
    shape = tuple(max(sizes) for sizes in zip(*(value.shape for value in large.values() if value.ndim == rank)))
    if all(axis.dim < rank and shape[axis.dim] == axis.size for axis in axes):
        return shape
    key, value = next(iter(large.items()))
    raise SymmetryError(
        f"{name} ({key}) has shape {tuple(value.shape)}, which is not that of a parameter with axes of "
        f"{', '.join(str(axis.size) for axis in axes)}; pass names with their parameters"
    )


def _moved(
    entries: Mapping[str, Any], axes: Sequence[AxisRef], shape: Shape | None, moves: CheckedPermutations
) -> dict[str, Any] | None:
    """Return the state of one parameter, moved; None if it cannot be."""
    moving = moves.together(axes)
    result: dict[str, Any] = {}
    for key, value in entries.items():
        if not _large(value):
            result[key] = value
        elif not moving:
            if moves.permutations and _spans(value, shape):
                return None
            result[key] = value
        else:
            moved = None if shape is None else _moved_entry(key, value, moving, shape, moves)
            if moved is None:
                return None
            result[key] = moved
    return result


def _apart(value: Any) -> Any:
    """Return a copy of another parameter's state."""
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _moved_entry(
    key: str, value: Any, moving: Sequence[Sequence[AxisRef]], shape: Shape, moves: CheckedPermutations
) -> Tensor | None:
    """Return an entry of a parameter's state, moved; None if its relation to the parameter is not known."""
    if (
        type(value) not in (Tensor, nn.Parameter)
        or value.is_sparse
        or not (value.is_floating_point() or value.is_complex())
    ):
        return None
    if (block := BLOCK.fullmatch(key)) is not None:
        return _moved_block(value, int(block[1]), moving, shape, moves)
    places = _places(key, tuple(value.shape), shape)
    if places is None:
        return None
    kept: list[AxisRef] = []
    for at_once in moving:
        inside = [axis.dim in places for axis in at_once]
        if any(inside) and not all(inside):
            return None  # which order its units have depends on an axis that the entry has lost
        if all(inside):
            kept += [replace(axis, dim=places[axis.dim]) for axis in at_once]
    return permute_tensor(value, key, kept, moves)


def _places(key: str, entry: Shape, shape: Shape) -> dict[int, int] | None:
    """Return the positions of the parameter's axes in an entry, without reduced axes; None if unknown."""
    if len(entry) == len(shape) and all(size in (1, whole) for size, whole in zip(entry, shape)):
        return {dim: dim for dim in range(len(shape)) if entry[dim] == shape[dim]}
    words = key.split("_")
    for word, lost in (("row", len(shape) - 1), ("col", len(shape) - 2)):
        if word in words and lost >= 0 and entry == (*shape[:lost], *shape[lost + 1 :]):
            return {dim: dim - (dim > lost) for dim in range(len(shape)) if dim != lost}
    return None


def _moved_block(
    value: Tensor, dim: int, moving: Sequence[Sequence[AxisRef]], shape: Shape, moves: CheckedPermutations
) -> Tensor | None:
    """Return a statistic (n, n) of one axis of a parameter with both its axes moved; None if it is not such a block."""
    if dim >= len(shape) or tuple(value.shape) != (shape[dim], shape[dim]):
        return None
    for at_once in moving:
        if all(axis.dim != dim for axis in at_once):
            continue
        if len(at_once) > 1:
            return None
        index = moves.index((at_once[0].layout,)).to(value.device)
        return value.detach().index_select(0, index).index_select(1, index)
    return value


def _large(value: Any) -> bool:
    """Tell whether a value is, or holds, a tensor of more than one element."""
    return any(tensor.numel() > 1 for tensor in _tensors(value))


def _spans(value: Any, shape: Shape | None) -> bool:
    """Tell whether a value may belong to several parameters together: a flat vector longer than this one."""
    size = 0 if shape is None else prod(shape)
    return any(tensor.ndim == 1 and tensor.numel() > size for tensor in _tensors(value))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for each in cast("Mapping[Any, Any]", value).values() for tensor in _tensors(each)]
    if isinstance(value, list | tuple):
        return [tensor for each in cast("Sequence[Any]", value) for tensor in _tensors(each)]
    return []
