"""Data in memory, parts of data, and torch datasets, read by index in whole batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from dimat.errors import DataError
from dimat.tasks.base import Batch, Data

Transform = Callable[[tuple[Tensor, ...], torch.Generator | None], tuple[Tensor, ...]]
"""Turns stored inputs of a batch into the model's: always the fixed part (scaling), and the random part (augmentation)
if there is a generator to draw it from."""


class TensorData:
    """Examples held in tensors with the examples along dim 0.

    `inputs`: one tensor or the model's positional arguments; `targets`: (N, …). Whole batches go through `transform` at
    each access, so augmentation is new each time and storage may be compact (uint8). Raises DataError if lengths
    differ.
    """

    def __init__(self, inputs: Tensor | Sequence[Tensor], targets: Tensor, transform: Transform | None = None) -> None:
        self.inputs: tuple[Tensor, ...] = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        self.targets = targets
        self.transform = transform
        lengths = [len(tensor) for tensor in (*self.inputs, targets)]
        if len(set(lengths)) != 1:
            raise DataError(f"inputs and targets differ in length: {lengths}")

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def labels(self) -> Tensor | None:
        """The targets if they are classes ((N,) integers), else None."""
        return self.targets if self.targets.ndim == 1 and self.targets.dtype == torch.int64 else None

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        inputs = tuple(tensor[indices] for tensor in self.inputs)
        if self.transform is not None:
            inputs = self.transform(inputs, generator)
        return Batch(inputs, self.targets[indices])


class Subset:
    """The examples of `data` at `indices` ((M,) int64), e.g. an agent's part; nothing is copied."""

    def __init__(self, data: Data, indices: Tensor) -> None:
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(data):
            raise DataError(f"indices reach from {int(indices.min())} to {int(indices.max())} of {len(data)} examples")
        self.data = data
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> Tensor | None:
        labels = self.data.labels
        return None if labels is None else labels[self.indices]

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        return self.data.batch(self.indices[indices], generator)


class MapDataset(Protocol):
    """A map-style torch dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def from_dataset(dataset: MapDataset, labels: Tensor | None = None) -> Data:
    """Return a map-style torch dataset, whose items are (input, …, target), as Data.

    `labels`: (N,) classes; by default an attribute `targets` or `labels` of the dataset, if it has one. Random
    transforms inside the dataset draw from torch's global generator: it is seeded for each batch (from the given
    generator, else with 0) and restored afterwards. Those that draw from numpy or `random` are not seeded. Items are
    read one by one: prefer TensorData if the data fit in memory.
    """
    return _DatasetData(dataset, labels)


class _DatasetData:
    def __init__(self, dataset: MapDataset, labels: Tensor | None) -> None:
        self.dataset = dataset
        found: Any = labels
        for name in ("targets", "labels"):
            if found is None:
                found = getattr(dataset, name, None)
        self._labels = None if found is None else _classes(found)
        if self._labels is not None and self._labels.shape != (len(dataset),):
            raise DataError(f"labels have shape {tuple(self._labels.shape)}, the dataset {len(dataset)} examples")

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def labels(self) -> Tensor | None:
        return self._labels

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0 if generator is None else draw_seed(generator))
            several: Any = getattr(self.dataset, "__getitems__", None)
            chosen = cast("list[int]", indices.tolist())
            items: Any = several(chosen) if several is not None else [self.dataset[i] for i in chosen]
        columns: Any = default_collate(items)
        if not isinstance(columns, list | tuple) or len(cast("list[Any]", columns)) < 2:
            raise DataError(f"items of {type(self.dataset).__name__} must be (input, …, target) tuples")
        *inputs, targets = cast("list[Tensor]", columns)
        return Batch(tuple(inputs), targets)


def _classes(labels: Any) -> Tensor:
    """Return labels as int64; DataError if they are not whole numbers."""
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"labels must be whole numbers, the classes: {error}; or give labels of another kind"
        ) from error
    whole = found.to(torch.int64)
    odd = (found != whole).flatten() if found.is_floating_point() else torch.zeros(0)
    if odd.any():
        first = int(odd.nonzero()[0])
        raise DataError(
            f"labels must be whole numbers, the classes: label {first} is {float(found.flatten()[first])}, "
            f"{int(odd.sum())} in all are none; leave these examples out, or give them a class"
        )
    return whole


def draw_seed(generator: torch.Generator) -> int:
    """Draw a seed in [0, 2^63 − 1) for another generator."""
    return int(torch.randint(2**63 - 1, (), generator=generator))


def batch_bounds(samples: int, batch_size: int) -> list[int]:
    """Return the start of each batch, and `samples` at the end.

    A short last batch is kept; a single leftover example joins the batch before it, because BatchNorm cannot
    train on a batch of one.
    """
    bounds = [*range(0, samples, batch_size), samples]
    if batch_size > 1 and len(bounds) > 2 and bounds[-1] - bounds[-2] == 1:
        del bounds[-2]
    return bounds


class InputBatches:
    """Model inputs without targets or augmentation, in one fixed order: each iteration gives the same batches.

    `order`: (M,) indices into `data`. Batches are tuples of tensors on `device`.
    """

    def __init__(self, data: Data, batch_size: int, order: Tensor, device: torch.device) -> None:
        self._data = data
        self._order = order
        self._bounds = batch_bounds(len(order), batch_size)
        self._device = device

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for start, stop in pairwise(self._bounds):
            batch = self._data.batch(self._order[start:stop])
            yield tuple(tensor.to(self._device, non_blocking=True) for tensor in batch.inputs)


def input_batches(
    data: Data,
    batch_size: int,
    generator: torch.Generator | None = None,
    *,
    samples: int | None = None,
    device: torch.device | str = "cpu",
) -> InputBatches:
    """Return inputs of `data` for alignment and BatchNorm re-estimation, as a re-iterable of tuples.

    The order is drawn once from `generator`, or is that of the data; `samples`: use only this many, from the start.
    """
    order = torch.arange(len(data)) if generator is None else torch.randperm(len(data), generator=generator)
    return InputBatches(data, batch_size, order[:samples], torch.device(device))


def balanced_draw(labels: Tensor, samples: int, generator: np.random.Generator) -> Tensor:
    """Return indices of `samples` examples, with classes as balanced as the data allow.

    Every prefix of the result is balanced too: classes take turns, in an order drawn anew for each turn.
    """
    values = labels.numpy()
    shuffled = generator.permutation(len(values))
    turn = np.empty(len(values), dtype=np.int64)  # how many of the same class come before each in `shuffled`
    for label in np.unique(values):
        places = np.flatnonzero(values[shuffled] == label)
        turn[places] = np.arange(len(places))
    ranked = np.lexsort((generator.random(len(values)), turn))
    return torch.from_numpy(shuffled[ranked[:samples]])
