"""What the wide zoo knows of one model: how to build it, what to give it, and what must come out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Built = tuple[nn.Module, Any]
"""A module and its example inputs: a tuple of arguments or a mapping of keyword arguments."""


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    `make` builds it with weights from torch's global generator. `outputs` is the selector of outputs where others
    pin what could move. `groups` and `heads` are the expected numbers of groups and of groups with a parent (None:
    not known). `tolerance` bounds the invariance error, `coverage` the share of parameters with a moved axis from
    below; `exception` says why where these are not those of the family. `unseen` marks a model for which no rule
    was written.
    """

    name: str
    source: Literal["torchvision", "timm", "transformers", "own", "diffusers", "torch_geometric"]
    family: Literal["cnn", "other"]
    make: Callable[[], Built]
    groups: int | None = None
    heads: int | None = None
    outputs: Sequence[int | str] | None = None
    unseen: bool = False
    tolerance: float = 1e-9
    least_coverage: float | None = None
    exception: str = ""

    @property
    def coverage(self) -> float:
        if self.least_coverage is not None:
            return self.least_coverage
        return 0.99 if self.family == "cnn" else 0.95


def build(entry: Entry) -> Built:
    """Build a model in eval mode, the same at every call; what libraries warn of while constructing is not ours."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(timm|torchvision|transformers|huggingface_hub)(\.|$)")
        torch.manual_seed(0)
        model, inputs = entry.make()
    return model.eval(), inputs


def images(size: int, batch: int = 2) -> torch.Tensor:
    """Return random square RGB images, (batch, 3, size, size)."""
    return torch.randn(batch, 3, size, size)


def words(count: int = 10, batch: int = 2, vocabulary: int = 101) -> torch.Tensor:
    """Return token ids, (batch, count), without the first few, which models take for padding."""
    return torch.randint(5, vocabulary, (batch, count))


def own(name: str, make: Callable[[], nn.Module], *inputs: Callable[[], torch.Tensor], **more: Any) -> Entry:
    """Return the entry of a model of our own, for which no rule was written, with what draws its inputs."""
    return Entry(name, "own", "other", lambda: (make(), tuple(draw() for draw in inputs)), unseen=True, **more)
