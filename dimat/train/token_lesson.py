"""Distillation between language models of any tokenizers, by what they say of a text."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dimat.device import autocast, own_streams, seeded_streams
from dimat.errors import ConfigError, HookError
from dimat.merge.token_map import Taught
from dimat.symmetry.trace import eval_mode
from dimat.tasks.base import Batch, Data, Task
from dimat.tasks.data import batch_bounds
from dimat.tasks.token_text import ProbeText
from dimat.train.contract import task_errors


def text_of(task: Task) -> ProbeText | None:
    """Return the probe text of a language model's task; None of a task that has no `token_logits`.

    HookError where `probe_text` is missing or no text of the probe set's examples.
    """
    if getattr(task, "token_logits", None) is None:
        return None
    with task_errors(task, "probe_text"):
        text: Any = getattr(task, "probe_text", None)
        examples = len(task.data("probe"))
    if not isinstance(text, ProbeText) or len(text.tokens) != examples or text.spans.shape != (*text.tokens.shape, 2):
        raise HookError(
            f"task {task.name} has token_logits, and its probe_text is no ProbeText of its {examples} probe examples "
            "(tokens (examples, P), spans (examples, P, 2))"
        )
    return text


def check_teachable_by_text(task: Task, key: str) -> None:
    """Raise ConfigError, naming the setting `key`, if a task's model cannot be taught beside its own loss."""
    if getattr(task, "train_step", None) is not None:
        raise ConfigError(f"{key} teaches by logits, and task {task.name} has a train_step of its own")


def token_logits_of(task: Task, outputs: Any, predictions: int) -> Tensor:
    """Return the logits (B, P, V) in a language model's outputs; HookError where they have another shape."""
    found: Any = getattr(task, "token_logits")(outputs)  # noqa: B009 an optional member
    if not isinstance(found, Tensor) or found.ndim != 3 or found.shape[1] != predictions:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise HookError(f"task {task.name}: token_logits() returned {shape}, not (B, {predictions}, V)")
    return found


def probe_token_logits(
    task: Task,
    model: nn.Module,
    probe: Data,
    text: ProbeText,
    keep: int,
    *,
    batch_size: int,
    precision: str,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return what a model says of a probe set in eval mode: the `keep` largest logits of each prediction, falling, in
    float32, and their tokens' ids in int64, both (examples × P, kept) on the CPU. Tokens without a text are left out.

    Memory: one batch's logits, and what is returned. Neither the model's mode nor random streams are disturbed.
    """
    values: list[Tensor] = []
    ids: list[Tensor] = []
    known = text.known.to(device)
    kept = min(keep, int(known.sum()))
    streams = own_streams(seeded_streams(0, device), device)
    with eval_mode(model), streams, torch.no_grad(), task_errors(task, "the probe text's logits"):
        for start, stop in pairwise(batch_bounds(len(probe), batch_size)):
            inputs = (tensor.to(device) for tensor in probe.batch(torch.arange(start, stop)).inputs)
            with autocast(precision, device):
                logits = token_logits_of(task, model(*inputs), text.tokens.shape[1])
            flat = logits.flatten(0, 1).float()[:, : len(known)]
            largest = flat.masked_fill(~known[: flat.shape[1]], -torch.inf).topk(min(kept, flat.shape[1]), 1)
            values.append(largest.values.cpu())
            ids.append(largest.indices.cpu())
    return torch.cat(values), torch.cat(ids)


class TokenLesson:
    """What teachers say of the tokens of a probe set, beside the own loss of a batch:

        L = (1 − w) · loss + w · T² · mean of KL(p̄ ‖ softmax(z / T))

    over the predictions of which somebody says something, of as many probe examples (blocks) as there are own ones,
    drawn again and again by `order` (Hinton et al. 2015, arXiv 1503.02531). `predictions`: P of an example;
    `said`: p̄, on the model's device; `weight`, `temperature`: w and T.

    Memory: p̄ stays sparse, 12 bytes for each share; of a batch there are the logits of its taught predictions, twice.
    """

    def __init__(
        self, probe: Data, predictions: int, said: Taught, weight: float, temperature: float, order: torch.Generator
    ) -> None:
        self._probe = probe
        self._predictions = predictions
        self._said = said
        self._weight = weight
        self._temperature = temperature
        self._generator = order
        self._taught = said.rows.cpu().div(predictions, rounding_mode="floor").unique()  # examples that teach anything
        self._places = torch.full((len(probe) * predictions,), -1)
        self._places[said.rows.cpu()] = torch.arange(len(said.rows))
        self._left = torch.zeros(0, dtype=torch.int64)

    def __call__(self, task: Task, model: nn.Module, batch: Batch, outputs: Any, loss: Tensor) -> Tensor:
        """Return L of a batch of own examples, given the model's outputs for it and their loss."""
        said, heat, device = self._said, self._temperature, self._said.shares.device
        chosen = self._next(min(len(batch.targets), len(self._taught)))
        inputs = (tensor.to(device) for tensor in self._probe.batch(chosen).inputs)
        logits = token_logits_of(task, model(*inputs), self._predictions).flatten(0, 1)
        places = self._places.reshape(-1, self._predictions)[chosen].flatten()
        told = (places >= 0).nonzero()[:, 0].to(device)
        places = places[places >= 0].to(device)
        ids, shares = said.ids[places], said.shares[places]
        scaled = logits[told].float() / heat
        meant = scaled.gather(1, ids) - scaled.logsumexp(1, keepdim=True)
        gap = (torch.xlogy(shares, shares) - shares * meant).sum(1).mean()
        return (1 - self._weight) * loss + self._weight * heat**2 * gap

    def _next(self, count: int) -> Tensor:
        """Return the next examples; all that teach are gone through before any comes again."""
        while len(self._left) < count:
            order = torch.randperm(len(self._taught), generator=self._generator)
            self._left = torch.cat([self._left, self._taught[order]])
        chosen, self._left = self._left[:count], self._left[count:]
        return chosen
