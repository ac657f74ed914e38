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
        """Return the examples at `indices` ((B,) int64). With a generator, augmentation is drawn from it, anew at each
        call; without, examples are unchanged."""
        ...


@runtime_checkable
class Task(Protocol):
    """A model with its data, loss and metrics.

    A task may also have

    - `train_step(model, batch) -> Tensor`, which returns the loss to differentiate, instead of
      `loss(model(*batch.inputs), batch.targets)`;
    - `logits(outputs) -> Tensor`, (B, classes), if targets are class indices and `loss` accepts logits as well as
      outputs: then `train.loss` may be another than the task's own (`dimat.train.losses`);
    - for a language model, to learn from the logits of others, also with other tokens (`dimat.merge.token_logits`):
      `token_logits(outputs) -> Tensor`, (B, P, V), of the P tokens of an example that it predicts, and `probe_text`, a
      `dimat.tasks.token_text.ProbeText`: the probe set's text, and where in it these tokens stand. They are kept apart
      from `logits`, which `train.loss` may change;
    - `derived_metrics(means) -> Mapping[str, float]`: metrics of a whole set from the means over it, such as a
      perplexity;
    - `loss_weight(targets) -> float`: the weight of a batch's loss in a mean over batches, 0 or more; by default the
      number of examples. A loss that ignores labels, such as those of padding, needs it, e.g.
      `(targets != -100).sum()`: parts of a batch (`train.accumulate`) and batches of a set are weighted by it;
    - `agreement`: a mapping of short texts by name that agents compare when they connect, such as a tokenizer's hash;
      agents with different ones refuse each other. "inputs" (how inputs are scaled) may differ, with a warning;
    - for a partly trained model, whose `state_dict()` then holds only that part: `base_hash`, a text that identifies
      the rest, which agents compare when they connect, and `merge_stages`, the merge stages for the part if the
      configuration names none, e.g. {"combine": "lora-svd"}. Both are attributes, empty or None if the whole model is
      trained.
    """

    @property
    def name(self) -> str: ...

    @property
    def metric(self) -> str:
        """The entry of `metrics` or `derived_metrics` that counts. Lower is better if its name says so, as "perplexity"
        and "eval_loss" do (`dimat.metrics`); else higher."""
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
        """Return a split. "probe" is a small public set that is used neither for training nor for metrics."""
        ...

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch, a scalar that is differentiable by the outputs."""
        ...

    def metrics(self, outputs: Any, targets: Tensor) -> Mapping[str, Tensor]:
        """Return per-example metrics, each of shape (B,); their means over a set are reported."""
        ...
