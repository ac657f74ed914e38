"""The Task protocol: model, data, loss and metrics, and nothing about agents or networks.

A task is any object with these members; `dimat.tasks.ClassificationTask` builds one from a model factory and
two data sets, and a hook (`file.py:function`) returns one. Data are read by index in whole batches, because
per-example Python calls would cost more than small models do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Split = Literal["train", "test", "probe"]


class Batch(NamedTuple):
    """`inputs`: the model's positional arguments, each with examples along dim 0; `targets`: for the loss."""

    inputs: tuple[Tensor, ...]
    targets: Tensor


@runtime_checkable
class Data(Protocol):
    """Examples read by index."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> Tensor | None:
        """Class of each example, (N,) int64, for partitions and histograms; None if there are no classes."""
        ...

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Return the examples at `indices` ((B,) int64). With a generator, augmentation is drawn from it,
        afresh at each call; without, examples come as they are."""
        ...


@runtime_checkable
class Task(Protocol):
    """A model with its data, loss and metrics.

    A task may also have

    - `train_step(model, batch) -> Tensor`, which returns the loss to differentiate, instead of
      `loss(model(*batch.inputs), batch.targets)`;
    - `logits(outputs) -> Tensor`, (B, classes), where targets are class indices and `loss` takes logits as well as
      outputs: then `train.loss` may be another than the task's own (`dimat.train.losses`);
    - `derived_metrics(means) -> Mapping[str, float]`: metrics of a whole set from the means over it, such as a
      perplexity;
    - `loss_weight(targets) -> float`: by how much the loss of a batch counts beside that of another, 0 or more; the
      number of examples where it is missing. A loss that leaves labels out, such as those of padding, needs it, e.g.
      `(targets != -100).sum()`: parts of a batch (`train.accumulate`) and batches of a set are weighed by it;
    - `agreement`: a mapping of short texts by name that agents compare when they meet, such as a tokenizer's hash;
      agents with different ones refuse each other. "inputs" (how inputs are scaled) may differ, and is told;
    - for a model that is trained in part, whose `state_dict()` then holds that part alone: `base_hash`, a text that
      names the rest, which agents compare when they meet, and `merge_stages`, the merge stages that the part asks for
      where the configuration names none, e.g. {"combine": "lora-svd"}. Both are attributes, empty or None if the
      whole model is trained.
    """

    @property
    def name(self) -> str: ...

    @property
    def metric(self) -> str:
        """The entry of `metrics` that counts; higher is better."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order; empty if there are no classes."""
        ...

    def build_model(self, generator: torch.Generator) -> nn.Module:
        """Return a freshly initialised model; all randomness comes from the generator."""
        ...

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Return inputs that the model accepts, with at least two examples along dim 0."""
        ...

    def data(self, split: Split) -> Data:
        """Return a split. "probe" is a small public set that no agent trains on and no metric is taken on."""
        ...

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch, a scalar that is differentiable by the outputs."""
        ...

    def metrics(self, outputs: Any, targets: Tensor) -> Mapping[str, Tensor]:
        """Return per-example metrics, each of shape (B,); their means over a set are reported."""
        ...
