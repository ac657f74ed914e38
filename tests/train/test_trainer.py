"""Local training. References: plain torch loops, and the trainer's own unbroken run for everything resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dimat.config import TaskConfig, TrainConfig
from dimat.errors import ConfigError, DataError, DimatError
from dimat.symmetry import derive_symmetry, permute_weights, random_permutations
from dimat.tasks import ClassificationTask, Subset, TensorData, load_task, mlp, seeded
from dimat.train.base import TrainerState
from dimat.train.optimizers import lr_factor
from dimat.train.trainer import Trainer


class Noisy(nn.Module):
    """BatchNorm, dropout and two layers: every kind of state that a resume must carry."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.dropout(F.relu(self.bn(self.fc1(x))), 0.3, self.training))


def jitter(inputs: tuple[Tensor, ...], generator: torch.Generator | None) -> tuple[Tensor, ...]:
    if generator is None:
        return inputs
    return tuple(x + 0.1 * torch.randn(x.shape, generator=generator) for x in inputs)


def blobs(samples: int = 70, transform: Any = jitter) -> TensorData:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(samples) % 3
    centres = torch.randn(3, 6, generator=generator)
    return TensorData(centres[labels] + 0.3 * torch.randn(samples, 6, generator=generator), labels, transform)


def task(data: TensorData | None = None, model: Any = Noisy) -> ClassificationTask:
    data = data or blobs()
    return ClassificationTask("blobs", seeded(model), data, data, data, ("a", "b", "c"))


def trainer(seed: int = 0, data: Any = None, model: Any = Noisy, rounds_total: int = 3, **config: Any) -> Trainer:
    settings = TrainConfig.model_validate({"device": "cpu", "batch_size": 16, **config})
    own = task(data, model)
    return Trainer(own, own.train, settings, seed=seed, path=("agent", 0), rounds_total=rounds_total)


def assert_same(a: TrainerState, b: TrainerState) -> None:
    assert a.values == b.values
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert torch.equal(tensor, b.tensors[name]), name


SETTINGS = [
    {},
    {"optimizer_state": "fresh"},
    {"optimizer": {"name": "sgd", "lr": 0.05}},
    {"optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.0}},
    {"optimizer": {"name": "adamw", "weight_decay": 0.01}, "grad_clip_norm": 0.5},
    {"epochs_per_round": 0.6, "lr_schedule": {"name": "cosine"}},
    {"steps_per_round": 7, "first_round_epochs": 1.5, "lr_schedule": {"name": "step", "milestones": [0.4]}},
    {"precision": "bf16"},
    {"precision": "fp16"},
    {"loss": "not-true-distillation"},
    {"loss": {"name": "distillation", "options": {"temperature": 2.0}}, "proximal": 0.5, "optimizer_state": "fresh"},
    {"proximal": 0.1, "accumulate": 2, "precision": "fp16", "optimizer": {"name": "sgd", "lr": 0.05}},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_resumed_training_equals_unbroken_training_bit_for_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    unbroken = trainer(**settings)
    reports = [unbroken.train(r) for r in (1, 2, 3)]
    first = trainer(**settings)
    first.train(1)
    state = first.state()
    # Through files, because that is how a checkpoint travels: flat tensors and JSON values, nothing else.
    save_file(state.tensors, tmp_path / "state.safetensors")
    values = json.loads(json.dumps(state.values))
    torch.rand(5)  # draws elsewhere do not matter
    second = trainer(seed=99, **settings)
    second.load_state(TrainerState(load_file(tmp_path / "state.safetensors"), values))
    assert_same(second.state(), state)
    for r in (2, 3):
        again = second.train(r)
        assert (again.loss, again.steps, again.samples) == (
            reports[r - 1].loss,
            reports[r - 1].steps,
            reports[r - 1].samples,
        )
    assert_same(second.state(), unbroken.state())


@pytest.mark.parametrize("rows", [40, 90])
def test_a_state_of_other_rows_continues_with_a_new_epoch_only(rows: int) -> None:
    """In the middle of an epoch of 70 rows: refused with both numbers and nothing changed; with `new_epoch` weights and
    optimizer go on, and the next epoch has each row that there is now once."""
    first = trainer(epochs_per_round=0.6)
    first.train(1)
    state = first.state()
    seen: list[int] = []

    def noted(inputs: tuple[Tensor, ...], generator: torch.Generator | None) -> tuple[Tensor, ...]:
        if generator is not None:
            seen.extend(int(value) for value in inputs[0][:, 0])
        return inputs

    data = blobs(rows, noted)
    data.inputs[0][:, 0] = torch.arange(rows)
    second = trainer(seed=9, data=data, epochs_per_round=1)
    before = second.state()
    batches = -(-rows // 16)
    told = rf"^the state is of 70 examples in 5 batches, this trainer has {rows} in {batches}; give the same data"
    with pytest.raises(DataError, match=told):
        second.load_state(state)
    assert_same(second.state(), before)
    second.load_state(state, new_epoch=True)
    for name, tensor in first.weights().items():
        assert torch.equal(second.weights()[name], tensor), name
    for mine, theirs in zip(second.state().tensors.items(), state.tensors.items()):
        if mine[0].startswith("optimizer"):
            assert torch.equal(mine[1], theirs[1])
    second.train(2)
    assert sorted(seen) == [*range(rows)]


def test_equal_seeds_train_bit_equally_and_others_differ() -> None:
    a, b, c = trainer(), trainer(), trainer(seed=1)
    for one in (a, b, c):
        torch.manual_seed(id(one) % 1000)
        one.train(1)
    assert_same(a.state(), b.state())
    assert not torch.equal(a.weights()["fc1.weight"], c.weights()["fc1.weight"])


def test_shared_initialisation_ignores_the_agent() -> None:
    settings = TrainConfig(device="cpu", initialisation="shared")
    own = task()
    a, b = (Trainer(own, own.train, settings, seed=3, path=("agent", i)) for i in range(2))
    assert all(torch.equal(value, b.weights()[name]) for name, value in a.weights().items())
    a.train(1)
    b.train(1)
    assert not torch.equal(a.weights()["fc1.weight"], b.weights()["fc1.weight"])


def test_training_leaves_the_global_generator_alone() -> None:
    one = trainer()
    before = torch.get_rng_state()
    one.train(1)
    one.evaluate(one.data)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_agrees_with_a_plain_torch_loop(name: str, kind: Any) -> None:
    """Reference: the same model, batches and (unfused) optimizer, written out."""
    data = blobs(64, transform=None)
    one = trainer(data=data, model=lambda: mlp((6, 8, 3)), optimizer={"name": name, "lr": 0.01}, epochs_per_round=1)
    model = mlp((6, 8, 3))
    model.load_state_dict(one.weights())
    options = {"momentum": 0.9} if name == "sgd" else {}
    optimizer = kind(model.parameters(), lr=0.01, fused=False, **options)
    order = torch.randperm(64, generator=torch.Generator().set_state(one.state().tensors["rng/batches"]))
    losses: list[float] = []
    for start in range(0, 64, 16):
        batch = data.batch(order[start : start + 16])
        loss = F.cross_entropy(model(*batch.inputs), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    report = one.train(1)
    assert report.loss == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert (report.steps, report.samples) == (4, 64)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(one.weights()[key], value, rtol=1e-5, atol=1e-6)


def test_kept_and_fresh_optimizer_state() -> None:
    kept, fresh = trainer(), trainer(optimizer_state="fresh")
    for one in (kept, fresh):
        one.train(1)
    assert torch.equal(kept.weights()["fc1.weight"], fresh.weights()["fc1.weight"])
    assert any(name.startswith("optimizer/") for name in kept.state().tensors)
    assert not any(name.startswith("optimizer/") for name in fresh.state().tensors)
    for one in (kept, fresh):
        one.train(2)
    assert not torch.equal(kept.weights()["fc1.weight"], fresh.weights()["fc1.weight"])


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, (10, 10)),  # two epochs of ⌈70 / 16⌉ = 5 batches
        ({"epochs_per_round": 0.5}, (3, 3)),
        ({"epochs_per_round": 0.01}, (1, 1)),
        ({"steps_per_round": 4}, (4, 4)),
        ({"steps_per_round": 4, "first_round_epochs": 3}, (15, 4)),
        ({"epochs_per_round": 1, "first_round_epochs": 2.2}, (11, 5)),
    ],
)
def test_length_of_a_round(settings: dict[str, Any], steps: tuple[int, int]) -> None:
    one = trainer(**settings)
    assert (one.train(1).steps, one.train(2).steps) == steps


class Recorded(TensorData):
    """Data that note which examples are read."""

    def __init__(self, samples: int) -> None:
        super().__init__(torch.randn(samples, 6), torch.arange(samples) % 3)
        self.read: list[int] = []

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Any:
        if generator is not None:
            self.read += indices.tolist()
        return super().batch(indices, generator)


def test_fractional_epochs_go_through_all_data_before_any_comes_again() -> None:
    data = Recorded(64)
    one = trainer(data=data, epochs_per_round=0.25)
    for r in range(1, 9):
        one.train(r)
    assert sorted(data.read[:64]) == sorted(data.read[64:]) == list(range(64))
    assert data.read[:64] != data.read[64:]


def test_a_single_leftover_example_joins_the_batch_before() -> None:
    """BatchNorm1d refuses a batch of one: 33 examples in batches of 16 are 16 + 17."""
    one = trainer(data=blobs(33), epochs_per_round=1)
    report = one.train(1)
    assert (report.steps, report.samples) == (2, 33)
    assert trainer(data=blobs(34), epochs_per_round=1).train(1).steps == 3


def test_batch_size_one_trains_without_batchnorm() -> None:
    one = trainer(data=blobs(5), model=lambda: mlp((6, 4, 3)), batch_size=1, epochs_per_round=1)
    assert one.train(1).steps == 5


def test_learning_rate_over_the_whole_run() -> None:
    cosine = trainer(lr_schedule={"name": "cosine"}, epochs_per_round=1)
    rates = [2e-3 * factor for r in (1, 2, 3) for factor in cosine._lr_factors(r, 5) or []]
    assert rates == pytest.approx([2e-3 * 0.5 * (1 + math.cos(math.pi * i / 15)) for i in range(15)])
    step = trainer(lr_schedule={"name": "step", "milestones": [0.5, 0.75], "gamma": 0.1})
    assert [lr_factor(step.config.lr_schedule, p) for p in (0, 0.49, 0.5, 0.8)] == pytest.approx([1, 1, 0.1, 0.01])
    cosine.train(3)
    assert cosine.optimizer.param_groups[0]["lr"] == pytest.approx(rates[-1])


def test_weights_are_copies_and_loading_checks_them() -> None:
    one, other = trainer(), trainer(seed=1)
    weights = one.weights()
    other.load_weights(weights)
    one.train(1)
    assert all(torch.equal(other.weights()[name], value) for name, value in weights.items())
    with pytest.raises(DataError, match=r"fc1\.weight has shape \(2, 2\), the model \(8, 6\)"):
        one.load_weights({**weights, "fc1.weight": torch.zeros(2, 2)})
    with pytest.raises(DataError, match="hold the unknown odd"):
        one.load_weights({**weights, "odd": torch.zeros(1)})


def test_loading_a_state_that_does_not_fit() -> None:
    one = trainer()
    one.train(1)
    state = one.state()
    with pytest.raises(DataError, match=r"of optimizer 'adam'.* is 'sgd'"):
        trainer(optimizer={"name": "sgd"}).load_state(state)
    lacking = {name: value for name, value in state.tensors.items() if name != "rng/augment"}
    with pytest.raises(DataError, match="lacks 'rng/augment'"):
        trainer().load_state(TrainerState(lacking, state.values))
    foreign = {**state.tensors, "optimizer/odd.weight/exp_avg": torch.zeros(3, 3)}
    with pytest.raises(DataError, match=r"entries of 'odd\.weight', which is no trained parameter"):
        trainer().load_state(TrainerState(foreign, state.values))


def test_input_batches_are_repeatable_and_plain() -> None:
    one = trainer()
    batches = one.input_batches(one.data, 16, torch.Generator().manual_seed(4), samples=33)
    first, again = (torch.cat([inputs[0] for inputs in batches]) for _ in range(2))
    assert len(batches) == 2
    assert torch.equal(first, again)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(4))[:33]
    assert torch.equal(first, one.data.inputs[0][order])


def test_a_diverging_loss_names_round_and_step() -> None:
    poisoned = blobs(transform=None)
    poisoned.inputs[0][7] = torch.nan
    with pytest.raises(DimatError, match=r"loss is nan in round 2, step \d of 10; lower train\.optimizer\.lr"):
        trainer(data=poisoned).train(2)


def test_weights_that_overflow_in_the_last_step_are_reported() -> None:
    one = trainer(model=lambda: mlp((6, 8, 3)), optimizer={"name": "sgd", "lr": 1e40, "momentum": 0}, steps_per_round=1)
    with pytest.raises(DimatError, match="weights are not finite after round 1"):
        one.train(1)


def test_clipping_bounds_the_step() -> None:
    """Reference: with plain SGD the step's norm is lr × gradient norm, so at most lr × the bound."""
    one = trainer(
        model=lambda: mlp((6, 8, 3)),
        optimizer={"name": "sgd", "lr": 1.0, "momentum": 0},
        steps_per_round=1,
        grad_clip_norm=0.01,
    )
    before = one.weights()
    one.train(1)
    moved = torch.cat([(value - before[name]).flatten() for name, value in one.weights().items()])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_a_task_may_bring_its_own_step() -> None:
    class Own(ClassificationTask):
        def train_step(self, model: nn.Module, batch: Any) -> Tensor:
            return 2.0 * self.loss(model(*batch.inputs), batch.targets)

    data = blobs(transform=None)
    own = Own("own", seeded(lambda: mlp((6, 3))), data, data, data, ("a", "b", "c"))
    settings = TrainConfig(device="cpu", steps_per_round=1, batch_size=70)
    doubled = Trainer(own, data, settings, seed=0).train(1).loss
    plain = Trainer(task(data, lambda: mlp((6, 3))), data, settings, seed=0).train(1).loss
    assert doubled == pytest.approx(2 * plain, rel=1e-6)


def test_unusable_device_and_empty_data() -> None:
    with pytest.raises(ConfigError, match=r"train\.device 'abacus' cannot be used here"):
        trainer(device="abacus")
    own = task()
    with pytest.raises(DataError, match="no samples"):
        Trainer(own, Subset(own.train, torch.arange(0)), TrainConfig(), seed=0)


def test_permuting_changes_neither_outputs_nor_what_training_goes_on_to_do() -> None:
    """Reference: an unpermuted twin with the same seed, its weights permuted at the end (Adam's moments included)."""
    digits = load_task(TaskConfig(name="digits", options={"width": 4}))
    part = Subset(digits.data("train"), torch.arange(200))
    settings = TrainConfig(device="cpu", epochs_per_round=1)
    one, twin = (Trainer(digits, part, settings, seed=0) for _ in range(2))
    spec = derive_symmetry(one.model, digits.example_inputs())
    permutations = random_permutations(spec, torch.Generator().manual_seed(5))
    for each in (one, twin):
        each.train(1)
    before = one.evaluate(part)
    one.permute(spec, permutations)
    assert not torch.equal(one.weights()["conv2.weight"], twin.weights()["conv2.weight"])
    assert one.evaluate(part)["nll"] == pytest.approx(before["nll"], rel=1e-5)
    for each in (one, twin):
        each.train(2)
    for name, value in permute_weights(twin.weights(), spec, permutations).items():
        torch.testing.assert_close(one.weights()[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model", ["cnn", "mlp"])
def test_learns_digits(model: str) -> None:
    digits = load_task(TaskConfig(name="digits", options={"model": model}))
    one = Trainer(digits, digits.data("train"), TrainConfig(device="cpu", epochs_per_round=3), seed=0)
    one.train(1)
    assert one.evaluate(digits.data("test"))["accuracy"] > 0.9


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(precision: str) -> None:
    """Without batch statistics: after an epoch with a short last batch (70 = 4·16 + 6), and parts of uneven size."""
    plain = lambda: mlp((6, 8, 3))  # noqa: E731
    runs = [
        trainer(data=blobs(transform=None), model=plain, accumulate=parts, precision=precision, epochs_per_round=1)
        for parts in (1, 3, 64)
    ]
    reports = [each.train(1) for each in runs]
    tolerance = 1e-6 if precision == "fp32" else 5e-3
    for report, run in zip(reports[1:], runs[1:], strict=True):
        assert (report.steps, report.samples) == (reports[0].steps, reports[0].samples) == (5, 70)
        assert report.loss == pytest.approx(reports[0].loss, rel=tolerance)
        for name, tensor in runs[0].weights().items():
            assert (run.weights()[name] - tensor).abs().max() <= tolerance, name


def test_parts_are_passes_of_their_own() -> None:
    """16 samples in 4 parts are four forward passes of 4; so memory is that of 4."""
    sizes: list[int] = []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return self.fc(x)

    trainer(data=blobs(16), model=Counting, accumulate=4, steps_per_round=1).train(1)
    assert sizes == [4, 4, 4, 4]


def test_metrics_of_a_whole_set_are_derived_from_the_means() -> None:
    """What the task's `derived_metrics` returns stands beside the means, which it is given."""
    own = trainer()
    object.__setattr__(own.task, "derived_metrics", lambda means: {"perplexity": math.exp(means["nll"])})
    found = own.evaluate(blobs(20))
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
