"""Distillation between language models. References: dense formulas, and the model called directly."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimat.errors import HookError
from dimat.merge.token_map import Taught
from dimat.tasks import TensorData
from dimat.tasks.base import Batch
from dimat.tasks.token_text import ProbeText
from dimat.train.token_lesson import TokenLesson, probe_token_logits, text_of

TOKENS, PREDICTIONS = 7, 3
TEXTS = (b"a", b"b", b"", b"d", b"e", b"f", b"g")
IDS = torch.randint(0, TOKENS, (5, PREDICTIONS + 1), generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """Looks each token's logits up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(1)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


class Text:
    """The part of a language model's task that a lesson asks for."""

    name = "text"
    probe_text = ProbeText(b"abc", TEXTS, IDS[:, 1:], torch.zeros(5, PREDICTIONS, 2))

    def data(self, split: str) -> TensorData:
        return TensorData(IDS, IDS)

    def token_logits(self, outputs: Tensor) -> Tensor:
        return outputs[:, :-1]


def test_a_lesson_is_the_formula_of_dense_shares() -> None:
    """(1 − w) loss + w T² mean KL over the taught predictions alone, of as many examples as own ones; gradients too."""
    draw = torch.Generator().manual_seed(2)
    rows = torch.tensor([0, 2, 4, 5, 12])  # of examples 0, 1 and 4
    ids = torch.stack([torch.randperm(TOKENS, generator=draw)[:3] for _ in rows])
    shares = torch.rand(len(rows), 3, generator=draw)
    shares[1, 2] = 0
    shares /= shares.sum(1, keepdim=True)
    model, task = Model(), Text()
    lesson = TokenLesson(task.data("probe"), PREDICTIONS, Taught(rows, ids, shares), 0.6, 2.0, torch.Generator())
    batch = Batch((IDS[:4],), IDS[:4])  # more than there are taught examples
    found = lesson(task, model, batch, None, (model.table**2).sum())  # pyright: ignore[reportArgumentType]
    dense = torch.zeros(len(rows), TOKENS).scatter_(1, ids, shares)
    logits = model(IDS)[:, :-1].flatten(0, 1)[rows]
    expected = 0.4 * (model.table**2).sum() + 0.6 * 4 * F.kl_div(
        F.log_softmax(logits / 2, 1), dense, reduction="batchmean"
    )
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(each, model.table)[0] for each in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_examples_that_teach_are_gone_through_before_any_comes_again() -> None:
    """Of five examples three are taught; in three steps of one example each all come once."""
    seen: list[list[int]] = []

    class Watched(TensorData):
        def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
            seen.append(indices.tolist())
            return super().batch(indices, generator)

    said = Taught(torch.tensor([0, 5, 14]), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    lesson = TokenLesson(Watched(IDS, IDS), PREDICTIONS, said, 0.5, 1.0, torch.Generator().manual_seed(3))
    for _ in range(6):
        lesson(Text(), Model(), Batch((IDS[:1],), IDS[:1]), None, torch.zeros(()))  # pyright: ignore[reportArgumentType]
    assert sorted(seen[:3]) == sorted(seen[3:]) == [[0], [1], [4]]


def test_the_largest_logits_of_tokens_that_have_a_text() -> None:
    """Reference: a sort of the model's logits; in batches of any size; of few tokens all but those without a text."""
    model, task = Model(), Text()
    model.train()
    logits = model(IDS)[:, :-1].flatten(0, 1).detach()
    logits[:, 2] = -torch.inf
    expected = logits.sort(1, descending=True)
    for size in (2, 5):
        values, ids = probe_token_logits(
            task,  # pyright: ignore[reportArgumentType]
            model,
            task.data("probe"),
            task.probe_text,
            3,
            batch_size=size,
            precision="fp32",
            device=torch.device("cpu"),
        )
        assert torch.equal(values, expected.values[:, :3])
        assert torch.equal(ids, expected.indices[:, :3])
    assert model.training


def test_a_task_is_asked_for_what_a_lesson_needs() -> None:
    """Without token_logits there is no text; with them it must be of all examples, and logits of all predictions."""
    other: Any = SimpleNamespace(name="odd")
    assert text_of(other) is None
    task: Any = Text()
    assert text_of(task) is task.probe_text
    for text in (None, replace(task.probe_text, tokens=IDS[:2, 1:])):
        task.probe_text = text
        with pytest.raises(HookError, match="its probe_text is no ProbeText of its 5 probe examples"):
            text_of(task)
    task.token_logits = lambda outputs: outputs
    lesson = TokenLesson(
        task.data("probe"),
        PREDICTIONS,
        Taught(torch.tensor([0]), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)),
        0.5,
        1.0,
        torch.Generator(),
    )
    with pytest.raises(HookError, match=r"token_logits\(\) returned \[1, 4, 7\], not \(B, 3, V\)"):
        lesson(task, Model(), Batch((IDS,), IDS), None, torch.zeros(()))
