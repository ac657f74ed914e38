"""Classifiers at the end of the bundled networks: an ordinary layer, or a fixed simplex."""

from __future__ import annotations

from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dimat.errors import ConfigError

Head = Literal["linear", "simplex"]
"""Kinds of head: `nn.Linear`, or `SimplexHead`."""


def make_head(kind: Head, features: int, classes: int) -> nn.Module:
    """Return a module from features (B, features) to logits (B, classes)."""
    return nn.Linear(features, classes) if kind == "linear" else SimplexHead(features, classes)


def simplex(classes: int) -> Tensor:
    """Return a regular simplex, (classes, classes − 1) in float64: unit rows, any two of cosine −1/(classes − 1).

    √(C / (C − 1)) times Helmert's orthonormal basis of the vectors that sum to 0: the same everywhere, without
    randomness. ConfigError for fewer than two classes.
    """
    if classes < 2:
        raise ConfigError(f'head = "simplex" needs two classes or more, the task has {classes}; use head = "linear"')
    basis = torch.zeros(classes, classes - 1, dtype=torch.float64)
    for k in range(1, classes):
        basis[:k, k - 1] = 1 / sqrt(k * (k + 1))
        basis[k, k - 1] = -sqrt(k / (k + 1))
    return basis * sqrt(classes / (classes - 1))


class SimplexHead(nn.Module):
    """A classifier whose classes have fixed directions, the same for all agents: logits = W P x.

    P, `project.weight` (classes − 1, features), is trained and merged like everything else. W, `weight` (classes,
    classes − 1), is `simplex`: never trained, and not in the state dict, so that it is never sent, merged or permuted;
    the units between P and W therefore stay in their order.

    Paper: Biondi et al., "Stationary Representations: Optimally Approximating Compatibility and Implications for
    Improved Model Replacements", CVPR 2024, arXiv 2405.02581 (its d-Simplex classifier, without its further loss).
    """

    weight: Tensor

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("weight", simplex(classes).float(), persistent=False)
        self.project = nn.Linear(features, classes - 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = self.project(x)
        return linear(z, self.weight.to(z.dtype))
