"""Examples that may be at fault: not finite, or with the smallest or largest numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from dimat.tasks.base import Data, Task
from dimat.tasks.data import Subset, TensorData
from dimat.train.contract import checked_batch, task_errors

SAMPLED = 32
"""Number of examples that are read if the data are not in tensors that could be searched as a whole."""
LOST = "its target is NaN"
WHOLE = (torch.int64, torch.int32)
"""Types of integers that are indices (of classes, of tokens), unlike pixels."""


def spread(count: int, most: int) -> list[int]:
    """Return positions spread over `count` examples, including the first and the last."""
    most = min(count, most)
    return sorted({round(i * (count - 1) / max(1, most - 1)) for i in range(most)})


def witnesses(task: Task, data: Data) -> dict[int, str]:
    """Return the examples that may be at fault, and why."""
    columns, places, read = _columns(task, data)
    names = [*(f"its inputs[{i}]" for i in range(len(columns) - 1)), "its target"]
    found: dict[int, str] = {}

    def note(place: Tensor, why: str) -> None:
        found.setdefault(int(read[place]), why)

    for name, tensor in zip(reversed(names), reversed(columns), strict=True):
        # the sum tells in one pass that there is nothing to look for
        if tensor.is_floating_point() and not tensor.sum().isfinite():
            own = tensor if places is None else tensor[places]
            lost = ~own.isfinite().reshape(len(own), -1).all(1)
            if lost.any():
                first = lost.nonzero()[0, 0]
                kind = "NaN" if own[first].isnan().any() else "inf"
                note(first, f"{name} {_has(own)} {kind} ({int(lost.sum())} such examples)")
    for name, tensor in zip(reversed(names), reversed(columns), strict=True):
        if tensor.dtype in WHOLE and tensor.numel():
            flat = (tensor if places is None else tensor[places]).reshape(len(read), -1)
            low, high = flat.amin(1), flat.amax(1)
            note(low.argmin(), f"{name} {_has(tensor)} {int(low.min())}, the smallest")
            note(high.argmax(), f"{name} {_has(tensor)} {int(high.max())}, the largest")
    return found


def unevenly_ignored(task: Task, data: Data) -> tuple[int, int] | None:
    """Return the examples with the fewest and the most negative labels, such as losses ignore; None if all have equally
    many."""
    columns, places, read = _columns(task, data)
    targets = columns[-1] if places is None else columns[-1][places]
    if targets.dtype not in WHOLE or not targets.numel():
        return None
    ignored = (targets.reshape(len(targets), -1) < 0).sum(1)
    few, most = int(ignored.argmin()), int(ignored.argmax())
    return None if ignored[few] == ignored[most] else (int(read[few]), int(read[most]))


def _has(tensor: Tensor) -> str:
    return "is" if tensor.ndim == 1 else "holds"


def _columns(task: Task, data: Data) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """Return inputs and, last, targets: as stored, with the positions in them that count (None: all), or as read for
    some examples; and the examples' indices."""
    stored = _stored(data)
    if stored is not None:
        return [*stored[0].inputs, stored[0].targets], stored[1], torch.arange(len(data))
    read = torch.tensor(spread(len(data), SAMPLED))
    with task_errors(task, f"data.batch() for {len(read)} of {len(data)} examples"):
        batch = checked_batch(task, data.batch(read), len(read), "data.batch()")
    return [*batch.inputs, batch.targets], None, read


def _stored(data: Data) -> tuple[TensorData, Tensor | None] | None:
    """Return the tensors that store the data, and the positions that count; None if they are stored elsewhere."""
    places: Tensor | None = None
    while isinstance(data, Subset):
        places = data.indices if places is None else data.indices[places]
        data = data.data
    return (data, places) if isinstance(data, TensorData) else None
