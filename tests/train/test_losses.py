"""Losses of local training. References: the papers' formulas computed by hand, and a plain torch loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dimat.config import TaskConfig, TrainConfig
from dimat.config.tree import NamedConfig
from dimat.errors import ConfigError
from dimat.tasks import ClassificationTask, Subset, load_task
from dimat.train.losses import LOSSES, LocalLoss, class_counts, skew
from tests.train.test_trainer import blobs, task, trainer

COUNTS = torch.tensor([90, 10, 0])


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, a teacher's logits and targets of six examples."""
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = (torch.randn(6, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return logits, teacher, torch.arange(6) % 3


def value(name: str, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a loss of the drawn examples, and what it was taken of."""
    logits, teacher, targets = drawn()

    def plain(changed: Tensor) -> Tensor:
        return F.cross_entropy(changed, targets)

    loss = LOSSES.bind(name, options)(plain, logits, targets, counts=COUNTS, teacher=teacher)
    return loss, logits, teacher, targets


def test_logit_adjusted() -> None:
    """Menon et al. 2021, eq. 10: -log of exp(f_y + τ log π_y) / Σ exp(f_c + τ log π_c)."""
    loss, logits, _, targets = value("logit-adjusted", tau=0.5, epsilon=0.03)
    shares = 0.97 * torch.tensor([0.9, 0.1, 0.0]) + 0.01
    raised = logits.exp() * shares**0.5
    by_hand = -(raised[torch.arange(6), targets] / raised.sum(1)).log().mean()
    torch.testing.assert_close(loss, by_hand, rtol=1e-6, atol=0)


def test_calibrated_and_restricted() -> None:
    """FedLC takes τ n^(-1/4) off each logit; FedRS scales the logits of absent classes alone."""
    loss, logits, _, targets = value("calibrated", tau=2.0)
    margin = 2.0 * torch.tensor([91.0, 11.0, 1.0]) ** -0.25
    torch.testing.assert_close(loss, F.cross_entropy(logits - margin, targets))
    loss, logits, _, targets = value("restricted", scale=0.25)
    torch.testing.assert_close(loss, F.cross_entropy(logits * torch.tensor([1.0, 1.0, 0.25]), targets))


def test_distillation() -> None:
    """Hinton et al. 2015 over all classes; Lee et al. 2022 over all but the true one, which need not agree."""
    loss, logits, teacher, targets = value("distillation", weight=0.25, temperature=2.0)
    p, q = (x.div(2).softmax(1) for x in (teacher, logits))
    by_hand = 0.75 * F.cross_entropy(logits, targets) + 0.25 * 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(loss, by_hand)
    loss, logits, teacher, targets = value("not-true-distillation", weight=0.5)
    gaps: list[Tensor] = []
    for i, true in enumerate(targets.tolist()):
        rest = [c for c in range(3) if c != true]
        p, q = teacher[i, rest].softmax(0), logits[i, rest].softmax(0)
        gaps.append((p * (p / q).log()).sum())
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets) + 0.5 * torch.stack(gaps).mean())


def test_skew_is_measured_against_the_whole() -> None:
    """Total variation; a part like the whole has none, whatever the whole's shares."""
    assert skew(torch.tensor([5, 5, 5])) == pytest.approx(0)
    assert skew(COUNTS) == pytest.approx(0.9 - 1 / 3)
    assert skew(torch.tensor([9, 1, 0]), COUNTS) == pytest.approx(0)


def test_auto_is_adjusted_only_where_classes_are_skewed() -> None:
    """With a note that names the key; even parts keep the task's loss to the last bit."""
    digits = load_task(TaskConfig(name="digits"))
    train = digits.data("train")
    labels = train.labels
    assert labels is not None
    few = Subset(train, (labels < 2).nonzero().flatten())
    even = LocalLoss.of(NamedConfig(name="auto"), digits, train)
    skewed = LocalLoss.of(NamedConfig(name="auto"), digits, few)
    assert even.note == ""
    assert 'train.loss = "task"' in skewed.note
    logits, targets = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    assert torch.equal(even(logits, targets), digits.loss(logits, targets))
    assert not torch.equal(skewed(logits, targets), digits.loss(logits, targets))
    assert torch.equal(
        LocalLoss.of(NamedConfig(name="task"), digits, few)(logits, targets), digits.loss(logits, targets)
    )


class Odd(ClassificationTask):
    """A user's task, which weighs classes by itself."""

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(outputs), targets, weight=torch.tensor([1.0, 2.0, 3.0]))


def test_a_users_own_loss_is_adjusted_and_not_replaced() -> None:
    """The adjusted logits go through the task's loss."""
    own = task()
    odd = Odd(own.name, own.model, own.train, own.test, own.probe, own.classes)
    few = Subset(own.train, torch.tensor([0, 3, 6, 1]))
    adjusted = LocalLoss.of(NamedConfig(name="logit-adjusted", options={"epsilon": 0.1}), odd, few)
    logits, targets = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    shares = 0.9 * torch.tensor([0.75, 0.25, 0.0]) + 0.1 / 3
    weights = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(
        adjusted(logits, targets), F.cross_entropy(logits + shares.log(), targets, weight=weights)
    )


class Stepping(ClassificationTask):
    """Computes its loss by itself."""

    def train_step(self, model: Any, batch: Any) -> Tensor:
        return self.loss(model(*batch.inputs), batch.targets)


class Plain:
    """A task that says nothing of logits; all else is another's."""

    def __init__(self, own: ClassificationTask) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        if name == "logits":
            raise AttributeError(name)
        return getattr(self._own, name)


def test_a_loss_that_does_not_fit_is_refused() -> None:
    """Tasks without logits, and those with a training step of their own; unknown names and options with the nearest."""
    own: Any = task()
    stepping = Stepping(own.name, own.model, own.train, own.test, own.probe, own.classes)
    for odd, why in ((Plain(own), "is for classification"), (stepping, "train_step of its own")):
        chosen: Any = odd
        assert LocalLoss.of(NamedConfig(name="auto"), chosen, Subset(own.train, torch.tensor([0, 3]))).note == ""
        with pytest.raises(ConfigError, match=why):
            LocalLoss.of(NamedConfig(name="restricted"), chosen, own.train)
    assert class_counts(Plain(own), own.train) is None  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="did you mean 'logit-adjusted'"):
        LocalLoss.of(NamedConfig(name="logit-adjust"), own, own.train)
    with pytest.raises(ConfigError, match="no option 'tua'"):
        LocalLoss.of(NamedConfig(name="logit-adjusted", options={"tua": 1}), own, own.train)


@pytest.mark.parametrize("name", ["distillation", "not-true-distillation"])
def test_the_teacher_is_the_model_as_the_round_began(name: str) -> None:
    """The first round has none; the second is that of a plain loop with a frozen copy, and leaves nothing behind."""
    taught, plain = trainer(loss=name), trainer(loss="task")
    taught.train(1)
    plain.train(1)
    for a, b in zip(taught.weights().values(), plain.weights().values(), strict=True):
        assert torch.equal(a, b)
    taught.train(2)
    plain.train(2)
    assert not all(torch.equal(a, b) for a, b in zip(taught.weights().values(), plain.weights().values(), strict=True))
    assert not [key for key in taught.state().tensors if key.startswith("teacher/")]


def test_training_with_the_adjusted_loss_goes_on_bit_for_bit() -> None:
    """Resumed from its state, as with any other loss."""
    whole, first, rest = (trainer(data=blobs(), loss="logit-adjusted") for _ in range(3))
    whole.train(1)
    whole.train(2)
    first.train(1)
    rest.load_state(first.state())
    rest.train(2)
    for a, b in zip(whole.weights().values(), rest.weights().values(), strict=True):
        assert torch.equal(a, b)
    assert TrainConfig.model_validate({"loss": "restricted"}).loss == NamedConfig(name="restricted")
