"""Batches of model inputs: from users' data to tuples of tensors, capped, cut and counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from math import ceil

import torch
from torch import Tensor, nn

from dimat.errors import MergeError
from dimat.merge.stages import Data, Inputs


def as_data(data: Iterable[Tensor | Sequence[Tensor]] | Tensor | None) -> Data | None:
    """Return data as batches of positional model arguments.

    Takes a tensor (one batch), or an iterable of tensors or of tuples of tensors. An iterator, which could be
    read only once, is read into memory.
    """
    if data is None:
        return None
    if isinstance(data, Tensor):
        return [(data,)]
    return _Tuples(list(data) if isinstance(data, Iterator) else data)


class _Tuples(Iterable[Inputs]):
    def __init__(self, data: Iterable[Tensor | Sequence[Tensor]]) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Inputs]:
        for batch in self._data:
            yield (batch,) if isinstance(batch, Tensor) else tuple(batch)


def count(inputs: Inputs) -> int:
    """Return the number of examples in a batch."""
    return inputs[0].shape[0]


def first_inputs(data: Data) -> Inputs:
    """Return the first batch, or raise MergeError if there is none."""
    for inputs in islice(data, 1):
        return inputs
    raise MergeError("the data to merge with are empty: pass at least one batch of model inputs")


def on_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Return a batch on a device. On a CPU images are in the channels-last layout, with which convolutions run a third
    faster; the values are the same."""
    moved = tuple(t.to(device) for t in inputs)
    if device.type != "cpu":
        return moved
    return tuple(t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in moved)


def device_of(model: nn.Module | None) -> torch.device:
    """Return the device of a model's first parameter; the CPU where there is none."""
    first = None if model is None else next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def take(data: Data, max_images: int | None, at_most: int | None = None) -> Iterator[Inputs]:
    """Yield batches up to `max_images` examples in all (None: all), cut into pieces of `at_most` examples."""
    left = max_images
    for whole in data:
        inputs = whole if left is None else tuple(t[:left] for t in whole)
        total = count(inputs)
        size = at_most or max(total, 1)
        for start in range(0, total, size):
            yield tuple(t[start : start + size] for t in inputs)
        if left is not None:
            left -= total
            if left <= 0:
                return


def join_single(batches: Iterable[Inputs]) -> Iterator[Inputs]:
    """Yield batches, joining each batch of one example to a neighbour: statistics of one example are undefined."""
    held: Inputs | None = None
    for inputs in batches:
        if held is None:
            held = inputs
        elif count(held) == 1 or count(inputs) == 1:
            held = tuple(torch.cat(pair) for pair in zip(held, inputs))
        else:
            yield held
            held = inputs
    if held is not None:
        yield held


class GeometricChecks:
    """Checks that are due once `first` images have been seen, then each time their number has grown by `factor`."""

    def __init__(self, first: int, factor: float = 2.0) -> None:
        self._next = first
        self._factor = factor

    def due(self, images: int) -> bool:
        """Tell whether a check is due after `images` images in all."""
        if images < self._next:
            return False
        while self._next <= images:
            self._next = ceil(self._next * self._factor)
        return True
