"""A user's data as a model's inputs: the first examples of a loader, left as it was.

Batches are tensors, sequences of tensors with the target last, or dicts by name (as Hugging Face collators give
them), of which the model gets the entries that its `forward` names.
"""

from __future__ import annotations

import copy
import inspect
import random
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dimat.errors import DataError

INPUTS_KEPT = 1024
"""Examples of the user's data, at most, that are kept to compare networks on."""
TARGETS = frozenset(("label", "labels", "label_ids", "start_positions", "end_positions", "target", "targets"))
"""Names under which batches by name hold what is no input."""
MASK = "attention_mask"
"""An input by this name says which places of a batch count, so that the others may be padded."""
DEPTH = 3
"""How deep a loader's attributes are looked into for random generators."""


@dataclass(frozen=True)
class Inputs:
    """Examples along dim 0. `names`: the model's arguments, if inputs are passed by name."""

    tensors: tuple[Tensor, ...]
    names: tuple[str, ...] = ()


class ByName:
    """A hook that hands a model its positional inputs by name."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        del module
        # what comes by name already, or in another number, is somebody else's call
        return ((), dict(zip(self.names, args))) if len(args) == len(self.names) and not kwargs else (args, kwargs)


def read_inputs(data: Iterable[Any], model: nn.Module) -> Inputs:
    """Return the first examples of `data`, concatenated, on the CPU; 1,024 at most.

    A loader's own random generators are restored afterwards. Raises DataError if no inputs can be read, or if batches
    do not fit together.
    """
    given: Any = data
    if isinstance(given, Dataset) and not isinstance(given, IterableDataset):
        raise DataError(f"data: a {type(given).__name__} gives single examples; give batches, by a DataLoader of it")
    if not isinstance(given, Iterable) and not hasattr(given, "__getitem__"):
        raise DataError(f"data must give batches, as loaders do; what is of type {type(given).__name__} gives none")
    parts: list[Inputs] = []
    count = 0
    with _generators_kept(data):
        for batch in _afresh(data):
            parts.append(_inputs_of(batch, model))
            count += len(parts[-1].tensors[0])
            if count >= INPUTS_KEPT:
                break
    if _read_once(data):
        warnings.warn(
            f"data: its examples can be read only once, so the first {count:,}, on which networks are compared, are "
            "not trained on; give data= other examples",
            stacklevel=3,
        )
    if count < 2:
        raise DataError("data gives fewer than two examples; networks are compared on a few hundred")
    names = parts[0].names
    odd = next(
        (i for i, part in enumerate(parts) if part.names != names or len(part.tensors) != len(parts[0].tensors)), 0
    )
    if odd:
        raise DataError(f"data: batch {odd} has other inputs than the first one; give batches of one kind")
    columns = list(zip(*(part.tensors for part in parts), strict=True))
    if MASK in names:
        columns = _padded(columns)
    for i, column in enumerate(columns):
        shape = column[0].shape[1:]
        for j, tensor in enumerate(column):
            if tensor.shape[1:] != shape or tensor.dtype != column[0].dtype:
                raise DataError(
                    f"data: input {names[i] if names else i} of batch {j} has examples of shape "
                    f"{tuple(tensor.shape[1:])} ({tensor.dtype}), in the first batch {tuple(shape)} "
                    f"({column[0].dtype}); give data whose batches all have one shape (pad or cut them)"
                )
    return Inputs(tuple(torch.cat(column)[:INPUTS_KEPT] for column in columns), names)


def _inputs_of(batch: Any, model: nn.Module) -> Inputs:
    """Return a batch's inputs, without its target."""
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        entries = tuple(cast("Sequence[Any]", batch))
        if entries and isinstance(entries[0], Mapping):  # inputs by name, and targets beside them
            batch = entries[0]
        elif len(entries) == 2 and isinstance(entries[0], tuple | list):  # several inputs together, and the target
            return _checked(tuple(cast("Sequence[Any]", entries[0])), ())
        else:
            return _checked(entries[:-1] if len(entries) > 1 else entries, ())
    if not isinstance(batch, Mapping):
        return _checked((batch,), ())
    table = cast("Mapping[str, Any]", batch)
    parameters = inspect.signature(model.forward).parameters
    # a wrapper hands everything on; what names arguments of its own gets those
    open_ended = all(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    needed = [key for key, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    known = [key for key in table if (key in parameters or open_ended) and (key not in TARGETS or key in needed)]
    names = tuple(key for key in known if isinstance(table[key], Tensor))
    if lost := [key for key in needed if key not in names]:
        raise DataError(
            f"data: the model's forward needs {lost[0]!r}, and batches have no tensor of that name "
            f"(they have {', '.join(map(repr, table))})"
        )
    return _checked(tuple(table[key] for key in names), names)


def _checked(tensors: Sequence[Any], names: tuple[str, ...]) -> Inputs:
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        kinds = ", ".join(sorted({type(tensor).__name__ for tensor in tensors}))
        raise DataError(
            "data must give tensors, sequences of tensors with the target last, or dicts of tensors by the names of "
            f"the model's arguments{f', not {kinds}' if kinds else ''}"
        )
    for tensor in tensors:
        if tensor.ndim == 0 or len(tensor) != len(tensors[0]):
            raise DataError(
                f"data: inputs of one batch have shapes {', '.join(str(tuple(t.shape)) for t in tensors)}; each needs "
                "the batch's examples along its first axis"
            )
    return Inputs(tuple(tensor.detach().cpu() for tensor in tensors), names)


def _padded(columns: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Return inputs (B, T) of unequal length with zeros up to the longest, which their attention mask leaves out."""
    longest = max(tensor.shape[1] for column in columns for tensor in column if tensor.ndim == 2)

    def pad(column: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if any(tensor.ndim != 2 for tensor in column) or len({tensor.shape[1] for tensor in column}) == 1:
            return column
        return tuple(nn.functional.pad(tensor, (0, longest - tensor.shape[1])) for tensor in column)

    return [pad(column) for column in columns]


def _afresh(data: Iterable[Any]) -> Iterable[Any]:
    """Return data to be read once. Of a loader a twin, with samplers of its own: their epochs go on in the user's loop
    alone, and workers that stay are started by it."""
    loader: Any = getattr(data, "base_dataloader", data)  # accelerate's keeps count of what is read through it
    if not isinstance(loader, DataLoader):
        return data
    twin: Any = copy.copy(cast("DataLoader[Any]", loader))
    own = {key: copy.copy(vars(twin)[key]) for key in ("sampler", "batch_sampler") if key in vars(twin)}
    inner = own.get("batch_sampler")
    if inner is not None and getattr(inner, "sampler", None) is loader.sampler:
        inner.sampler = own["sampler"]
    vars(twin).update(own, persistent_workers=False, _iterator=None)
    return twin


def _read_once(data: Iterable[Any]) -> bool:
    """Tell whether a loader's dataset goes on where it was left, each time it is read."""
    held: Any = getattr(data, "base_dataloader", data)
    for _ in range(DEPTH if isinstance(held, DataLoader) else 0):
        held = getattr(cast("Any", held), "dataset", None)
        if isinstance(held, IterableDataset) and iter(cast("Any", held)) is iter(cast("Any", held)):
            return True
    return False


@contextmanager
def _generators_kept(data: Iterable[Any]) -> Generator[None]:
    """Put the random generators that a loader holds, in its samplers and its dataset too, back to where they are."""
    held = list(_generators(data, DEPTH, set()))
    states: list[Any] = []
    for generator in held:
        if isinstance(generator, torch.Generator):
            states.append(generator.get_state())
        elif isinstance(generator, random.Random):
            states.append(generator.getstate())
        else:
            states.append(generator.bit_generator.state)
    try:
        yield
    finally:
        for generator, state in zip(held, states):
            if isinstance(generator, torch.Generator):
                generator.set_state(state)
            elif isinstance(generator, random.Random):
                generator.setstate(state)
            else:
                generator.bit_generator.state = state


def _generators(
    value: Any, depth: int, seen: set[int]
) -> Generator[torch.Generator | random.Random | np.random.Generator]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Generator | random.Random | np.random.Generator):
        yield value
    elif depth and not isinstance(value, Tensor | nn.Module | type):
        for each in vars(value).values() if hasattr(value, "__dict__") else ():
            yield from _generators(each, depth - 1, seen)
