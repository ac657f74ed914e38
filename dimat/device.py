"""Devices, and the global random generators that forward passes on them draw from."""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dimat.errors import ConfigError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Autocast types of forward passes by `train.precision`; fp32 has none."""


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which forward passes run in a precision: "fp32", "bf16" or "fp16"."""
    dtype = AUTOCAST.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def resolve_device(name: str, key: str = "train.device") -> torch.device:
    """Return the device that the setting `key` names; "auto" is cuda if there is one, else cpu.

    Raises ConfigError if the device cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"{key} {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def seeded_streams(seed: int, device: torch.device) -> dict[str, Tensor]:
    """Return seeded states for the generators from which a forward pass draws (for dropout)."""
    states = {"cpu": torch.Generator().manual_seed(seed).get_state()}
    if device.type == "cuda":
        states["cuda"] = torch.Generator(device).manual_seed(seed).get_state()
    return states


@contextmanager
def own_streams(states: dict[str, Tensor], device: torch.device) -> Generator[None]:
    """Run torch's global generators from `states`, which are updated in place, and then restore the generators."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        set_streams(states, device)
        yield
        states.update(current_streams(device))


def current_streams(device: torch.device) -> dict[str, Tensor]:
    """Return the current states of the generators from which a forward pass draws."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_streams(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Set the generators from which a forward pass draws to these states."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


@contextmanager
def streams_kept() -> Generator[None]:
    """Restore the process's global random streams (torch's on all devices, numpy's, Python's) on leaving the context.

    For code that runs inside a user's program, whose random draws it must not change.
    """
    cuda = torch.cuda.is_initialized()
    cpu, devices = torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else []
    arrays, plain = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(devices)
        np.random.set_state(arrays)
        random.setstate(plain)
