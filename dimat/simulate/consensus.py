"""How far apart the agents are: the distance of each one's weights from their mean."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open


def consensus_distances(files: Mapping[str, Path]) -> dict[str, float]:
    """Return ‖θ_i − θ̄‖₂ / ‖θ̄‖₂ for each agent i, over all floating-point tensors; θ̄ is the mean of the agents.

    Read tensor by tensor from safetensors files: one tensor per agent is in memory.
    """
    squares = dict.fromkeys(files, 0.0)
    mean_square = 0.0
    with ExitStack() as stack:
        opened = {name: stack.enter_context(safe_open(path, framework="pt")) for name, path in files.items()}
        first = next(iter(opened.values()))
        for tensor_name in first.keys():
            tensors = [file.get_tensor(tensor_name) for file in opened.values()]
            if not tensors[0].is_floating_point():
                continue
            stacked = torch.stack([t.double().flatten() for t in tensors])
            mean = stacked.mean(0)
            mean_square += float(mean @ mean)
            for name, row in zip(opened, stacked - mean, strict=True):
                squares[name] += float(row @ row)
    scale = mean_square**0.5 or 1.0
    return {name: square**0.5 / scale for name, square in squares.items()}
