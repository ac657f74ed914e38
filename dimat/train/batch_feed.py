"""An agent's batches, epoch after epoch: drawn from a seed, gathered, resumed bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from dimat.device import current_streams, set_streams
from dimat.tasks.base import Batch, Data, Task
from dimat.tasks.data import batch_bounds
from dimat.train.contract import checked_batch
from dimat.train.progress import Progress

GATHER_BYTES = 4 << 20
"""Examples are gathered for several batches at once, up to about this size, which fits into a cache."""


class BatchFeed:
    """Batches of `data` on a device, epoch after epoch; an epoch may span several rounds.

    `order` and `augment`: the generators from which orders and augmentation are drawn.
    """

    def __init__(
        self,
        task: Task,
        data: Data,
        batch_size: int,
        device: torch.device,
        order: torch.Generator,
        augment: torch.Generator,
    ) -> None:
        self._task = task
        self._data = data
        self._batch_size = batch_size
        self._device = device
        self._order_rng = order
        self._augment_rng = augment
        self._epoch_rng = order.get_state()  # where the current epoch's order was drawn from
        self._order = torch.empty(0, dtype=torch.int64)
        self._position = 0  # batches of the current epoch that are done; 0: its order is still to be drawn
        self._bounds = batch_bounds(len(data), batch_size)
        self._most_gathered = 0

    @property
    def batches(self) -> int:
        """Batches in an epoch."""
        return len(self._bounds) - 1

    @property
    def position(self) -> int:
        """Completed batches of the current epoch."""
        return self._position

    def gather(self, progress: Progress) -> list[Batch]:
        """Return the next batches of a round; after an interruption, first the rest of those gathered before it."""
        if not progress.within:
            progress.first = self._position
            progress.before = {
                "batches": self._order_rng.get_state(),
                "augment": self._augment_rng.get_state(),
                **current_streams(self._device),
            }
            return self._next(progress.steps - progress.done)
        now = current_streams(self._device)
        self._position = progress.first
        self._order_rng.set_state(progress.before["batches"])
        self._augment_rng.set_state(progress.before["augment"])
        set_streams(progress.before, self._device)  # data may draw from them too
        batches = self._next(progress.steps - progress.done + progress.within)
        set_streams(now, self._device)
        return batches[progress.within :]

    def tensors(self) -> dict[str, Tensor]:
        """Return the states of its random streams, in the form of a trainer's state."""
        streams = {"batches": self._order_rng, "augment": self._augment_rng}
        return {
            **{f"rng/{name}": stream.get_state() for name, stream in streams.items()},
            "rng/epoch": self._epoch_rng.clone(),
        }

    def load(self, tensors: Mapping[str, Tensor], position: int) -> None:
        """Continue from the result of `tensors`, at a position in the epoch; KeyError if a stream is missing."""
        self._augment_rng.set_state(tensors["rng/augment"])
        self._epoch_rng = tensors["rng/epoch"].clone()
        self._order_rng.set_state(self._epoch_rng)
        self._order = torch.randperm(len(self._data), generator=self._order_rng)
        self._order_rng.set_state(tensors["rng/batches"])
        self._position = min(position, self.batches)

    def _next(self, most: int) -> list[Batch]:
        """Return the next batches of the epoch, at most `most`, on the device."""
        if self._position in (0, self.batches):
            self._position = 0
            self._epoch_rng = self._order_rng.get_state()
            self._order = torch.randperm(len(self._data), generator=self._order_rng)
        if not self._most_gathered:
            example = self._data.batch(torch.zeros(1, dtype=torch.int64))
            size = sum(t.numel() * t.element_size() for t in (*example.inputs, example.targets))
            self._most_gathered = max(1, GATHER_BYTES // max(1, size * self._batch_size))
        first = self._position
        last = min(self.batches, first + most, first + self._most_gathered)
        bounds = self._bounds[first : last + 1]
        chosen = self._order[bounds[0] : bounds[-1]]
        gathered = checked_batch(self._task, self._data.batch(chosen, self._augment_rng), len(chosen), "data.batch()")
        sizes = [b - a for a, b in pairwise(bounds)]
        inputs = [t.to(self._device, non_blocking=True).split(sizes) for t in gathered.inputs]
        targets = gathered.targets.to(self._device, non_blocking=True).split(sizes)
        self._position = last
        return [Batch(*pair) for pair in zip(zip(*inputs, strict=True), targets, strict=True)]


def parts_of(batch: Batch, count: int, least: int) -> list[Batch]:
    """Return a batch in `count` parts of nearly equal size; in fewer if they would have under `least` examples."""
    size = len(batch.targets)
    count = max(1, min(count, size // least))
    if count == 1:
        return [batch]
    bounds = [size * i // count for i in range(count + 1)]
    return [Batch(tuple(t[a:b] for t in batch.inputs), batch.targets[a:b]) for a, b in pairwise(bounds)]
