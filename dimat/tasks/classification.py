"""Classification, the most common task: inputs, classes, a model that returns logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimat.tasks.base import Data, Split


@dataclass(frozen=True)
class ClassificationTask:
    """A task of cross-entropy over classes. The model returns logits, (B, classes), alone or as
    `logits` of an output of transformers.

    `model`: called with a generator, returns a freshly initialised model (`seeded` wraps a factory that draws
    from torch's global generator); `probe`: a small public set apart from both train and test; `classes`: names
    in label order; `agreement`: see `Task`. Metrics: "accuracy" (the one that counts) and "nll", the negative
    log-likelihood in nats.
    """

    name: str
    model: Callable[[torch.Generator], nn.Module]
    train: Data
    test: Data
    probe: Data
    classes: tuple[str, ...]
    metric: str = "accuracy"
    agreement: Mapping[str, str] = field(default_factory=dict[str, str])

    def build_model(self, generator: torch.Generator) -> nn.Module:
        return self.model(generator)

    def example_inputs(self) -> tuple[Tensor, ...]:
        return self.train.batch(torch.arange(min(2, len(self.train)))).inputs

    def data(self, split: Split) -> Data:
        return {"train": self.train, "test": self.test, "probe": self.probe}[split]

    def logits(self, outputs: Any) -> Tensor:
        """Return the logits (B, classes) in a model's outputs; logits are their own."""
        return getattr(outputs, "logits", outputs)

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(outputs), targets)

    def metrics(self, outputs: Any, targets: Tensor) -> Mapping[str, Tensor]:
        logits = self.logits(outputs)
        nll = F.cross_entropy(logits.float(), targets, reduction="none")
        return {"accuracy": (logits.argmax(1) == targets).float(), "nll": nll}
