"""Derives all seeds from one experiment seed: no two draws share a stream, none is hidden.

Every random draw in dimat comes from a generator that is passed in; these helpers make those generators.
A derived seed is the first 8 bytes of blake3 over the root seed and a path of names: stable across
platforms, Python versions and worker processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blake3 import blake3

if TYPE_CHECKING:
    import numpy as np
    import torch


def derive_seed(seed: int, *path: str | int) -> int:
    """Return the seed in [0, 2^63) for the stream that `path` names under the root `seed`."""
    text = "\x1f".join([str(seed), *map(str, path)])
    return int.from_bytes(blake3(text.encode()).digest(length=8), "big") >> 1


def torch_generator(seed: int, *path: str | int) -> torch.Generator:
    """Return a CPU torch generator for the stream that `path` names."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, *path))


def numpy_generator(seed: int, *path: str | int) -> np.random.Generator:
    """Return a numpy generator for the stream that `path` names."""
    import numpy as np

    return np.random.default_rng(derive_seed(seed, *path))
