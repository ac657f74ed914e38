"""A task's contract at every batch. References: plain torch losses of whole batches, and trainers without parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimat.config import TrainConfig
from dimat.errors import ConfigError, DataError, HookError
from dimat.tasks import Batch, ClassificationTask, TensorData, mlp, seeded
from dimat.tasks.base import Data, Split
from dimat.train import Trainer
from dimat.train.contract import check_parts

IGNORED = -100


def rows(count: int, features: int = 8, classes: int = 3) -> TensorData:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, features, generator=generator)
    return TensorData(inputs, torch.randint(classes, (count,), generator=generator))


def task(data: Data, model: Any = lambda: mlp((8, 3)), kind: type[ClassificationTask] = ClassificationTask) -> Any:
    return kind("rows", seeded(model), data, data, data, ("a", "b", "c"))


def trainer(own: Any, **config: Any) -> Trainer:
    return Trainer(own, own.data("train"), TrainConfig.model_validate({"device": "cpu", **config}), seed=0)


def with_batchnorm() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class Tokens:
    """Six labels an example, of which the first four examples have one that counts and the others all."""

    name, metric, classes = "tokens", "accuracy", ()

    def __init__(self, *, empty: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(8, 6, 8, generator=generator)
        targets = torch.randint(3, (8, 6), generator=generator)
        targets[:4, 1:] = IGNORED
        if empty:
            targets[:2] = IGNORED
        self._data = TensorData(inputs, targets)

    def build_model(self, generator: torch.Generator) -> nn.Module:
        return seeded(lambda: nn.Linear(8, 3))(generator)

    def example_inputs(self) -> tuple[Tensor, ...]:
        return (self._data.inputs[0][:2],)

    def data(self, split: Split) -> Data:
        return self._data

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def metrics(self, outputs: Any, targets: Tensor) -> dict[str, Tensor]:
        right = ((outputs.argmax(-1) == targets) & (targets >= 0)).float()
        return {"accuracy": right.sum(1) / (targets >= 0).sum(1).clamp(min=1)}


class WeighedTokens(Tokens):
    def loss_weight(self, targets: Tensor) -> float:
        return float((targets != IGNORED).sum())


# ── metrics and losses ───────────────────────────────────────────────────────────────────────────────────────
Loss = Callable[[Any, Tensor], Any]

METRICS: dict[str, Loss] = {
    "mean of the batch": lambda o, t: {"accuracy": (o.argmax(1) == t).float().mean()},
    "four columns": lambda o, t: {"accuracy": (o.argmax(1) == t).float()[:, None].expand(-1, 4)},
    "each with each": lambda o, t: {"accuracy": (o.argmax(1)[:, None] == t).float()},
    "a number": lambda o, t: {"accuracy": (o.argmax(1) == t).float().mean().item()},
    "a list": lambda o, t: {"accuracy": [1.0] * len(t)},
    "no values": lambda o, t: {"accuracy": torch.zeros(len(t), device="meta")},
    "complex": lambda o, t: {"accuracy": torch.zeros(len(t), dtype=torch.complex64)},
    "no mapping": lambda o, t: (o.argmax(1) == t).float(),
}


@pytest.mark.parametrize("kind", METRICS)
def test_a_metric_that_is_not_one_number_an_example_is_refused(kind: str) -> None:
    """They were counted as .014 or 1.52 where the accuracy is .45."""

    class Odd(ClassificationTask):
        def metrics(self, outputs: Any, targets: Tensor) -> Any:
            return METRICS[kind](outputs, targets)

    own = trainer(task(rows(100), kind=Odd), eval_batch_size=32)
    with pytest.raises(HookError, match=r"task rows: metrics\(\).*return"):
        own.evaluate(rows(100))


@pytest.mark.parametrize("form", ["bool", "int64", "float16", "column"])
def test_metrics_of_any_real_type_have_the_same_mean(form: str) -> None:
    class Typed(ClassificationTask):
        def metrics(self, outputs: Any, targets: Tensor) -> Any:
            right = outputs.argmax(1) == targets
            return {"accuracy": right[:, None] if form == "column" else right.to(getattr(torch, form))}

    data = rows(100)
    expected = trainer(task(data), eval_batch_size=32).evaluate(data)["accuracy"]
    assert trainer(task(data, kind=Typed), eval_batch_size=32).evaluate(data)["accuracy"] == pytest.approx(expected)


LOSSES: dict[str, tuple[Loss, str]] = {
    "one for each": (lambda o, t: F.cross_entropy(o, t, reduction="none"), r"return the mean loss .*\.mean\(\)"),
    "a number": (lambda o, t: F.cross_entropy(o, t).item(), "return the mean loss"),
    "no gradient": (lambda o, t: F.cross_entropy(o.detach(), t), "without a gradient"),
    "argmax": (lambda o, t: (o.argmax(1) != t).float().mean(), "without a gradient"),
    "another library's error": (lambda o, t: F.cross_entropy(o, t + 1), "IndexError: Target 3 is out of bounds"),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_that_cannot_be_trained_on_is_refused_in_one_line(kind: str) -> None:
    loss, says = LOSSES[kind]

    class Odd(ClassificationTask):
        def loss(self, outputs: Any, targets: Tensor) -> Any:
            return loss(outputs, targets)

    with pytest.raises(HookError, match=says) as caught:
        trainer(task(rows(64), kind=Odd)).train(1)
    assert "task rows" in str(caught.value)
    assert "\n" not in str(caught.value)


BATCHES: dict[str, tuple[Callable[[Batch], Any], str]] = {
    "dict": (lambda b: {"x": b.inputs[0], "y": b.targets}, r"return Batch\(inputs, targets\)"),
    "bare tensor": (lambda b: (b.inputs[0], b.targets), "inputs are a tuple of tensors"),
    "list of labels": (lambda b: (b.inputs, b.targets.tolist()), "give a tensor"),
    "other length": (lambda b: Batch(b.inputs, b.targets[:-1]), "one for each index"),
    "no example": (lambda b: Batch(b.inputs, b.targets.sum()), "one for each index"),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_data_that_return_no_batch_are_refused(kind: str) -> None:
    turn, says = BATCHES[kind]

    class Odd(TensorData):
        def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Any:
            return turn(super().batch(indices, generator))

    data = Odd(torch.randn(40, 8), torch.zeros(40, dtype=torch.int64))
    own = trainer(task(data))
    own._feed._most_gathered = 1  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(HookError, match=says):
        own.train(1)
    with pytest.raises(HookError, match=says):
        own.evaluate(data)


# ── parts of a batch ─────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("samples", "size", "parts"), [(35, 32, 2), (66, 32, 2), (67, 32, 4), (33, 8, 3), (6, 4, 2), (5, 5, 2)]
)
def test_no_part_of_one_example_is_cut_for_batchnorm(samples: int, size: int, parts: int) -> None:
    seen: list[int] = []

    class Watching(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            if self.training:
                seen.append(len(input))
            return super().forward(input)

    own = trainer(
        task(rows(samples), lambda: Watching(*cast("nn.Sequential", with_batchnorm()))),
        batch_size=size,
        accumulate=parts,
        epochs_per_round=1,
    )
    seen.clear()  # it was asked whether it can train on one
    assert own.train(1).samples == samples
    assert sum(seen) == samples
    assert min(seen) >= 2


@pytest.mark.parametrize(
    ("samples", "config", "kind", "says"),
    [
        (64, {"batch_size": 4, "accumulate": 4}, ConfigError, "train.accumulate = 4 cuts batches of 4 into single"),
        (64, {"batch_size": 1}, ConfigError, "train.batch_size = 1 makes batches of one example"),
        (1, {}, DataError, "there is one example to train on"),
    ],
)
def test_batches_of_one_example_are_refused_under_batchnorm(
    samples: int, config: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says) as caught:
        trainer(task(rows(samples), with_batchnorm), **config)
    assert "BatchNorm1d '1'" in str(caught.value)
    assert "Expected more than 1 value per channel" in str(caught.value)


def test_batches_of_one_example_are_trained_on_where_the_model_can() -> None:
    """A BatchNorm over an image has more than one value a channel; and a network may have none."""
    images = TensorData(torch.randn(6, 1, 5, 5), torch.arange(6) % 3)
    conv = lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3))  # noqa: E731
    for own in (task(images, conv), task(rows(6))):
        for config in ({"batch_size": 1}, {"batch_size": 3, "accumulate": 3}):
            assert trainer(own, epochs_per_round=1, **config).train(1).samples == 6


def test_asking_whether_one_example_is_enough_leaves_no_trace() -> None:
    data = rows(33)
    before = torch.get_rng_state()
    cut = trainer(task(data, with_batchnorm), batch_size=8, accumulate=3)
    assert torch.equal(torch.get_rng_state(), before)
    plain = trainer(task(data, with_batchnorm), batch_size=8)
    for name, tensor in plain.weights().items():
        assert torch.equal(cut.weights()[name], tensor), name


def test_parts_of_a_loss_that_leaves_labels_out_are_refused_without_weights() -> None:
    for precision in ("fp32", "bf16"):
        with pytest.raises(HookError, match=r"train\.accumulate would change .*; give the task loss_weight"):
            trainer(Tokens(), batch_size=8, accumulate=4, steps_per_round=6, precision=precision)


def test_parts_of_a_training_step_of_ones_own_are_compared_too() -> None:
    class Stepping(Tokens):
        def train_step(self, model: nn.Module, batch: Batch) -> Tensor:
            return self.loss(model(*batch.inputs), batch.targets)

    with pytest.raises(HookError, match="give the task loss_weight"):
        trainer(Stepping(), batch_size=8, accumulate=2)


def test_labels_left_out_without_a_sign_are_noticed_in_the_first_epoch() -> None:
    """Padding by class 0, which the loss leaves out: no label is negative."""

    class Padded(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self._data.targets += 1
            self._data.targets[:4, 1:] = 0

        def loss(self, outputs: Any, targets: Tensor) -> Tensor:
            return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=0)

        def build_model(self, generator: torch.Generator) -> nn.Module:
            return seeded(lambda: nn.Linear(8, 4))(generator)

    one = trainer(Padded(), batch_size=8, accumulate=4, steps_per_round=6)
    with pytest.raises(HookError, match="give the task loss_weight"):
        one.train(1)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_are_weighed_by_the_labels_that_count(parts: int, empty: bool) -> None:
    """Reference: whole batches. With `empty`, examples in which no label counts, whose mean loss is no number."""
    whole, cut = (
        trainer(WeighedTokens(empty=empty), batch_size=8, accumulate=count, steps_per_round=5) for count in (1, parts)
    )
    assert cut.train(1).loss == pytest.approx(whole.train(1).loss, rel=1e-5)
    for name, tensor in whole.weights().items():
        torch.testing.assert_close(cut.weights()[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_loss_of_a_set_does_not_depend_on_the_size_of_its_batches() -> None:
    """Reference: the loss of all labels that count, in one."""
    own = WeighedTokens(empty=True)
    data = own.data("test")
    found = [trainer(own, eval_batch_size=size).evaluate(data)["loss"] for size in (1, 2, 3, 8)]
    model = own.build_model(torch.Generator().manual_seed(0))
    one = trainer(own)
    batch = data.batch(torch.arange(8))
    with torch.no_grad():
        model.load_state_dict(one.model.state_dict())
        expected = float(own.loss(model(*batch.inputs), batch.targets))
    assert found == pytest.approx([expected] * 4, rel=1e-5)


def test_a_round_in_which_no_label_counts_changes_nothing() -> None:
    own = WeighedTokens()
    own._data.targets[:] = IGNORED  # pyright: ignore[reportPrivateUsage]
    for precision in ("fp32", "fp16"):
        one = trainer(own, precision=precision, optimizer={"name": "sgd", "lr": 1.0})
        before = one.weights()
        report = one.train(1)
        assert report.loss != report.loss
        assert all(torch.equal(tensor, before[name]) for name, tensor in one.weights().items())


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    class Odd(Tokens):
        def loss_weight(self, targets: Tensor) -> float:
            return weight

    with pytest.raises(HookError, match="loss_weight"):
        trainer(Odd()).train(1)


def test_parts_are_compared_by_outputs_of_any_form() -> None:
    """Tuples and mappings, with entries that are None, scalars or not floating."""

    class Own(Tokens):
        def loss(self, outputs: Any, targets: Tensor) -> Tensor:
            return super().loss(outputs[0]["logits"], targets)

    own, generator = Own(), torch.Generator().manual_seed(1)
    batch = own.data("train").batch(torch.arange(8))

    def part(first: int, last: int) -> tuple[Any, Tensor]:
        logits = torch.randn(last - first, 6, 3, generator=generator)
        ids = torch.arange(last - first)
        return ({"logits": logits, "ids": ids, "none": None, "scale": torch.tensor(1.0)}, [ids]), batch.targets[
            first:last
        ]

    check_parts(own, [part(4, 6), part(6, 8)])
    check_parts(own, [part(0, 2), part(2, 4)])
    with pytest.raises(HookError, match="loss_weight"):
        check_parts(own, [part(0, 4), part(4, 8)])
