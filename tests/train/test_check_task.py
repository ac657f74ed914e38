"""Tasks tried before training. Reference: for every fault the key, member or example that a reader would look for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimat.config import TaskConfig, TrainConfig
from dimat.errors import DataError, DimatError, HookError
from dimat.tasks import Batch, ClassificationTask, Subset, TensorData, from_dataset, load_task, mlp, seeded
from dimat.tasks.base import Data
from dimat.train.check_task import check_task
from dimat.train.trainer import Trainer
from tests.pages import ROOT
from tests.train.test_contract import BATCHES, LOSSES, METRICS, Loss, Tokens, WeighedTokens, rows, task, with_batchnorm


def check(own: Any, **config: Any) -> tuple[str, ...]:
    return check_task(own, TrainConfig.model_validate({"device": "cpu", **config}))


def of(loss: Loss | None = None, metrics: Loss | None = None, **members: Callable[..., Any]) -> Any:
    """A task of `rows` with other members."""
    own = task(rows(100))
    for name, member in {"loss": loss, "metrics": metrics, **members}.items():
        if member is not None:
            object.__setattr__(own, name, member)
    return own


def regression(loss: Loss, targets: Tensor | None = None, units: int = 1) -> Any:
    """A task with (B, units) outputs and floating targets, (B,)."""
    targets = torch.randn(40, generator=torch.Generator().manual_seed(2)) if targets is None else targets
    data = TensorData(torch.randn(40, 8, generator=torch.Generator().manual_seed(1)), targets)

    class Regression(ClassificationTask):
        def loss(self, outputs: Any, targets: Tensor) -> Tensor:
            return loss(outputs, targets)

        def metrics(self, outputs: Any, targets: Tensor) -> Any:
            return {"accuracy": -(outputs[:, 0] - targets).abs()}

    return Regression("regression", seeded(lambda: nn.Linear(8, units)), data, data, data, ())


@pytest.mark.parametrize("name", ["cnn", "mlp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("parts", [1, 4])
def test_a_sound_task_passes_and_no_stream_is_disturbed(name: str, precision: str, parts: int) -> None:
    own = load_task(TaskConfig(name="digits", options={"model": name}))
    before = torch.get_rng_state()
    assert check(own, precision=precision, accumulate=parts) == ()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("own", [Tokens(), WeighedTokens(), WeighedTokens(empty=True), task(rows(9), with_batchnorm)])
def test_losses_that_leave_labels_out_and_batchnorm_pass(own: Any) -> None:
    assert check(own) == ()


def test_parts_of_a_loss_that_leaves_labels_out_are_refused_before_training() -> None:
    with pytest.raises(HookError, match=r"give the task loss_weight\(targets\)"):
        check(Tokens(), accumulate=2)
    assert check(WeighedTokens(), accumulate=2) == ()


@pytest.mark.parametrize("kind", METRICS)
def test_metrics_are_looked_at(kind: str) -> None:
    with pytest.raises(HookError, match=r"metrics\(\)"):
        check(of(metrics=METRICS[kind]))


def test_one_number_a_class_is_not_taken_for_one_an_example() -> None:
    """Whatever the number of examples that the task is tried on."""
    for classes in range(2, 9):
        data = rows(60, classes=classes)

        class Odd(ClassificationTask):
            def metrics(self, outputs: Any, targets: Tensor) -> Any:
                return {"accuracy": outputs.mean(0)}

        own = Odd("odd", seeded(lambda: mlp((8, classes))), data, data, data, tuple(map(str, range(classes))))  # noqa: B023
        with pytest.raises(HookError, match="one number an example"):
            check(own)


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_are_looked_at(kind: str) -> None:
    loss, says = LOSSES[kind]
    with pytest.raises(HookError, match=says):
        check(of(loss=loss))


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_are_looked_at(kind: str) -> None:
    turn, says = BATCHES[kind]

    class Odd(TensorData):
        def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Any:
            return turn(super().batch(indices, generator))

    with pytest.raises(HookError, match=says):
        check(task(Odd(torch.randn(40, 8), torch.arange(40) % 3)))


def _lost(means: dict[str, float]) -> Any:
    return {"p": means["nothing"]}


def _unread(model: nn.Module, batch: Batch) -> Any:
    return model(batch)


def _forgotten(model: nn.Module, batch: Batch) -> None:
    model(*batch.inputs)


MEMBERS: dict[str, tuple[Callable[[], Any], str]] = {
    "model returns a tuple": (
        lambda: task(rows(40), lambda: nn.LSTM(8, 3)),
        r"failed in loss\(\) \(the model returned a tuple of 2 .*TypeError",
    ),
    "inputs of float64": (
        lambda: task(TensorData(torch.randn(40, 8, dtype=torch.float64), torch.arange(40) % 3)),
        r"the model, on inputs \(\d+, 8\) float64; give float32: RuntimeError",
    ),
    "inputs of another width": (
        lambda: task(rows(40, features=9)),
        r"failed in the model, on inputs \(\d+, 9\) float32: RuntimeError: mat1 and mat2",
    ),
    "labels of int32": (
        lambda: task(TensorData(torch.randn(40, 8), (torch.arange(40) % 3).int())),
        r"failed in loss\(\).*targets are \(\d+,\) int32",
    ),
    "metric that is not there": (
        lambda: of(metrics=lambda o, t: {"acuracy": (o.argmax(1) == t).float()}),
        "metric 'accuracy' is none of its metrics; did you mean 'acuracy'",
    ),
    "derived metrics": (
        lambda: of(derived_metrics=_lost),
        r"failed in derived_metrics\(\): KeyError",
    ),
    "model without parameters": (
        lambda: task(rows(40, features=3), nn.Identity),
        "no parameter that requires a gradient",
    ),
    "sum": (lambda: of(loss=lambda o, t: F.cross_entropy(o, t, reduction="sum")), "the sum over a batch"),
    "infinite gradient": (
        lambda: regression(lambda o, t: (o * 0).sum().abs().sqrt() + (o[:, 0] - t).square().mean()),
        "gradient of .* is not finite",
    ),
    "infinite loss": (lambda: of(loss=lambda o, t: (o * 0).mean().log()), "loss is -inf before any training"),
    "build_model": (lambda: task(rows(40), lambda: nn.Linear(-1, 3)), r"failed in build_model\(\)"),
    "example inputs": (lambda: of(example_inputs=lambda: {"x": 1}), "example_inputs"),
    "training step": (lambda: of(train_step=_unread), r"failed in train_step\(\)"),
    "step without a loss": (
        lambda: of(train_step=_forgotten),
        r"train_step\(\) returned a NoneType",
    ),
    "each with each": (
        lambda: regression(lambda o, t: (o - t).square().mean()),
        r"compares each of the outputs, \(4, 1\) float32, with each of the targets",
    ),
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_a_member_that_does_not_what_it_should_is_named(kind: str) -> None:
    make, says = MEMBERS[kind]
    with pytest.raises(HookError, match=says) as caught:
        check(make())
    assert "\n" not in str(caught.value)


def test_a_loss_that_compares_examples_is_told_and_refused_in_parts() -> None:
    """InfoNCE over a batch: more examples, more to tell apart."""

    def contrast(outputs: Tensor, targets: Tensor) -> Tensor:
        scores = outputs @ outputs.T + targets[:, None].float()
        return F.cross_entropy(scores, torch.arange(len(outputs)))

    (note,) = check(of(loss=contrast))
    assert "not the mean of its examples' losses" in note
    with pytest.raises(HookError, match="loss_weight"):
        check(of(loss=contrast), accumulate=2)


def test_a_loss_that_is_drawn_anew_at_each_call_is_not_told_from_its_parts() -> None:
    own = of(loss=lambda o, t: F.cross_entropy(o + 0.1 * torch.randn(o.shape), t))
    assert check(own, accumulate=2) == ()


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        (None, "its classes are a NoneType; give a tuple of their names"),
        ("abc", "its classes are a str"),
        ({"a": 0, "b": 1, "c": 2}, "its classes are a dict"),
        (("a", "b", "a"), "two of its classes are called 'a'"),
    ],
)
def test_classes_are_names(classes: Any, says: str) -> None:
    data = rows(40)
    with pytest.raises(HookError, match=says):
        check(ClassificationTask("rows", seeded(lambda: mlp((8, 3))), data, data, data, classes))


def test_a_probe_set_that_the_model_does_not_take_is_told_where_it_is_used() -> None:
    own = ClassificationTask(
        "rows", seeded(lambda: mlp((8, 3))), rows(40), rows(40), rows(9, features=9), ("a", "b", "c")
    )
    assert check(own) == ()
    with pytest.raises(
        HookError, match=r"failed in the model, on inputs \(4, 9\) float32: RuntimeError: mat1 and mat2"
    ):
        check_task(own, TrainConfig(device="cpu"), probe=True)


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────
def labelled(values: Any, inputs: Tensor | None = None) -> Any:
    targets = torch.as_tensor(values)
    inputs = torch.randn(len(targets), 8, generator=torch.Generator().manual_seed(0)) if inputs is None else inputs
    return task(TensorData(inputs, targets))


class Unlabelled:
    """Data that say labels of their own beside sound targets."""

    def __init__(self, labels: Any, count: int = 40) -> None:
        self._data = rows(40)
        self._count = count
        self.labels: Any = labels

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        return self._data.batch(indices, generator)


def nan_at(place: int, tensor: Tensor, value: float = float("nan")) -> Tensor:
    changed = tensor.clone()
    changed[place] = value
    return changed


class Reading(nn.Module):
    """Ten tokens, read by their mean."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(10, 8, sparse=sparse), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.table(tokens).mean(1))


def tokens(ids: Tensor, *, sparse: bool = False) -> Any:
    return task(TensorData(ids, torch.arange(len(ids)) % 3), lambda: Reading(sparse=sparse))


CLASSES = (torch.arange(200) % 3).tolist()
DATA: dict[str, tuple[Callable[[], Any], str]] = {
    "label too large": (lambda: labelled([*CLASSES[:77], 7, *CLASSES]), r"example 77: label 7 is none of 0 … 2"),
    "label negative": (lambda: labelled([*CLASSES[:50], -1, *CLASSES]), r"example 50: label -1 is none of 0 … 2"),
    "label ignored": (lambda: labelled([*CLASSES[:50], -100, *CLASSES]), r"example 50: label -100"),
    "NaN label": (
        lambda: task(Unlabelled(nan_at(12, torch.zeros(40)))),
        r'data\("train"\).labels are \(40,\) float32; give classes as int64, or None; label 12 is NaN, 1 in all',
    ),
    "labels of text": (lambda: task(Unlabelled(["a"] * 40)), "labels are a list of 40"),
    "labels of bool": (lambda: task(Unlabelled(torch.zeros(40, dtype=torch.bool))), "give classes as int64"),
    "fewer labels": (lambda: task(Unlabelled(torch.zeros(39, dtype=torch.int64))), r"shape \(39,\) for 40 examples"),
    "one-hot labels": (lambda: task(Unlabelled(torch.zeros(40, 3, dtype=torch.int64))), r"shape \(40, 3\)"),
    "no examples": (lambda: task(Subset(rows(10), torch.arange(0))), r'data\("train"\) is empty'),
    "NaN target": (
        lambda: regression(lambda o, t: F.mse_loss(o[:, 0], t), nan_at(17, torch.randn(40))),
        r'data\("train"\), example 17: its target is NaN \(1 such examples\), so that its loss and accuracy are not',
    ),
    "NaN among labels, which are floats by it": (
        lambda: labelled(nan_at(90, torch.tensor(CLASSES).float())),
        r"90: its target is NaN \(1 such examples\); leave such examples out\. .*RuntimeError: expected .*Long",
    ),
    "token without an embedding": (
        lambda: tokens(torch.randint(10, (40, 5)).index_fill(0, torch.tensor([17]), 12)),
        r"example 17: its inputs\[0\] holds 12, the largest: .*IndexError: index out of range",
    ),
    "negative token": (
        lambda: tokens(torch.randint(10, (40, 5)).index_fill(0, torch.tensor([3]), -1)),
        r"example 3: its inputs\[0\] holds -1, the smallest: .*IndexError",
    ),
    "infinite target": (
        lambda: regression(lambda o, t: F.mse_loss(o[:, 0], t), nan_at(39, torch.randn(40), float("inf"))),
        r"example 39: its target is inf",
    ),
    "NaN input": (
        lambda: labelled(CLASSES, nan_at(150, torch.randn(200, 8))),
        r"example 150: its inputs\[0\] holds NaN",
    ),
    "infinite input": (
        lambda: labelled(CLASSES, nan_at(0, torch.randn(200, 8), float("-inf"))),
        r"example 0: its inputs\[0\] holds inf",
    ),
    "class without an output": (
        lambda: ClassificationTask("few", seeded(lambda: mlp((8, 2))), rows(40), rows(40), rows(40), ("a", "b", "c")),
        "label 2 has no output of the model, which has 2",
    ),
}


@pytest.mark.parametrize("kind", DATA)
def test_data_at_fault_are_named_with_split_and_example(kind: str) -> None:
    make, says = DATA[kind]
    with pytest.raises(DataError, match=says) as caught:
        check(make())
    assert "\n" not in str(caught.value)


def test_an_example_of_a_part_is_named_by_its_place_in_the_part() -> None:
    inputs = nan_at(150, torch.randn(200, 8))
    data = Subset(Subset(TensorData(inputs, torch.tensor(CLASSES)), torch.arange(100, 200)), torch.arange(10, 90))
    with pytest.raises(DataError, match="example 40: its inputs"):
        check(task(data))
    assert check(task(Subset(data, torch.arange(41, 80)))) == ()


def test_what_the_task_leaves_out_itself_is_no_fault() -> None:
    """Targets that are NaN where nothing was measured, masked in loss and metrics; inputs filled in by the model."""

    def masked(outputs: Tensor, targets: Tensor) -> Tensor:
        known = ~targets.isnan()
        return (outputs[:, 0] - targets.nan_to_num()).square().mul(known).sum() / known.sum().clamp(min=1)

    own = regression(masked, nan_at(17, torch.randn(40)))
    closeness: Loss = lambda o, t: {"accuracy": -(o[:, 0] - t.nan_to_num()).abs()}  # noqa: E731
    object.__setattr__(own, "metrics", closeness)
    assert not [note for note in check(own) if "NaN" in note]

    class Filling(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.nan_to_num())

    data = TensorData(nan_at(150, torch.randn(200, 8)), torch.tensor(CLASSES))
    assert check(task(data, lambda: Filling(8, 3))) == ()


def test_an_optimizer_that_cannot_step_is_told() -> None:
    with pytest.raises(DimatError, match="sparse"):
        check(tokens(torch.randint(10, (40, 5)), sparse=True))
    assert check(tokens(torch.randint(10, (40, 5)), sparse=True), optimizer={"name": "sgd", "momentum": 0.0}) == ()


def test_a_class_that_is_alone_is_told() -> None:
    (note,) = check(labelled([1] * 40))
    assert note == 'task rows: data("train"): all 40 examples are of class 1'


class Items:
    """A map-style dataset of pairs."""

    def __init__(self, count: int, said: int | None = None) -> None:
        self.count, self.said = count, said or count

    def __len__(self) -> int:
        return self.said

    def __getitem__(self, index: int) -> Any:
        if index >= self.count:
            raise IndexError(index)
        return torch.ones(8), index % 3


def test_a_dataset_that_says_too_many_items_is_refused() -> None:
    with pytest.raises(HookError, match=r"failed in data\.batch\(\) for .*IndexError"):
        check(task(from_dataset(Items(40, said=50))))
    assert check(task(from_dataset(Items(40)))) == ()


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ([0.0, 1.0, float("nan")], r"label 2 is nan, 1 in all"),
        (torch.tensor([0.0, 0.5, 2.0]), "label 1 is 0.5"),
        ([0, 1, None], "labels"),
        (["a", "b", "c"], "labels"),
    ],
)
def test_labels_of_a_dataset_that_are_no_classes_are_refused(targets: Any, says: str) -> None:
    """NaN became −9223372036854775808, and a half its floor."""
    dataset = Items(3)
    dataset.targets = targets  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(DataError, match=says):
        from_dataset(dataset)


def test_whole_numbers_stored_as_floats_are_classes() -> None:
    dataset = Items(3)
    dataset.targets = torch.tensor([0.0, 2.0, 1.0])  # pyright: ignore[reportAttributeAccessIssue]
    labels = from_dataset(dataset).labels
    assert labels is not None
    assert labels.tolist() == [0, 2, 1]


def test_errors_are_of_dimats_own_kinds_whatever_the_task_raises() -> None:
    """Every member, raising in every way a user's code does."""

    def failing(error: Exception) -> Callable[..., Any]:
        def member(*_: Any) -> Any:
            raise error

        return member

    for error in (ValueError("a\nb"), IndexError(3), RuntimeError(), KeyError("x"), AssertionError(), StopIteration()):
        for member in ("loss", "metrics", "build_model", "example_inputs", "data", "derived_metrics", "loss_weight"):
            with pytest.raises(DimatError, match="task rows failed") as caught:
                check(of(**{member: failing(error)}))
            assert "\n" not in str(caught.value)


def test_data_may_be_a_single_example() -> None:
    one: Data = rows(1)
    assert check(task(one)) == ()


def test_the_page_on_tasks_shows_what_is_said() -> None:
    """The lines in docs/tasks.md, made anew."""
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    inputs = torch.randn(1000, 20, generator=torch.Generator().manual_seed(0))

    class Mean(ClassificationTask):
        def metrics(self, outputs: Any, targets: Tensor) -> Any:
            return {"accuracy": (outputs.argmax(1) == targets).float().mean()}

    def signs(labels: Tensor, kind: type[ClassificationTask] = ClassificationTask) -> ClassificationTask:
        data = TensorData(inputs, labels)
        return kind("signs", seeded(lambda: mlp((20, 32, 2))), data, data, data, ("minus", "plus"))

    def started(own: Any, **config: Any) -> None:
        check(own, **config)
        Trainer(own, own.data("train"), TrainConfig.model_validate({"device": "cpu", **config}), seed=0)

    labels = (inputs.sum(1) > 0).long()
    wrong = labels.clone()
    wrong[77] = 2
    for own, config in (
        (signs(labels, Mean), {}),
        (signs(wrong), {}),
        (task(rows(64), with_batchnorm), {"batch_size": 1}),
    ):
        with pytest.raises(DimatError) as caught:
            started(own, **config)
        hook = "" if config else "my_task.py:task: "
        assert f"error: {hook}{caught.value}\n" in page
