"""Tries a task once, on a few examples, before hours are spent on it.

It checks data, labels, model, loss, gradients and metrics. The examples depend on the data: the first and the last,
those with the smallest and the largest label, and those with values that are not finite. The task decides whether such
an example is a fault: a NaN that its loss ignores is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from dimat.config import TrainConfig
from dimat.device import AUTOCAST, autocast, own_streams, resolve_device, seeded_streams
from dimat.errors import ConfigError, DataError, DimatError, HookError, nearest
from dimat.seeds import torch_generator
from dimat.symmetry.trace import eval_mode
from dimat.tasks.base import Batch, Data, Split, Task
from dimat.tasks.data import batch_bounds
from dimat.train.contract import (
    HALF_TOLERANCE,
    TOLERANCE,
    alike,
    check_names,
    checked_batch,
    checked_loss,
    checked_metrics,
    described,
    first_line,
    loss_weight,
    task_errors,
    unlike_parts,
)
from dimat.train.optimizers import build_optimizer
from dimat.train.stepper import Stepper
from dimat.train.witnesses import LOST, spread, unevenly_ignored, witnesses

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
TRIED = 4
"""Examples in the ordinary batch on which the task is tried."""
COMPARED = 2_000_000
"""About the number of parameter entries whose gradients are compared: those of the last tensors, as all depend on the
loss."""


# ── sizes of batches ─────────────────────────────────────────────────────────────────────────────────────────
def check_sizes(task: Task, data: Data, config: TrainConfig) -> int:
    """Return the fewest examples that the task's model can train on: 1, or 2 with BatchNorm over single values.

    Raises ConfigError if `train.batch_size` or `train.accumulate` would give it fewer, DataError if `data` have fewer.
    The model is run only if batches or parts of one example could occur.
    """
    bounds = batch_bounds(len(data), config.batch_size)
    sizes = {b - a for a, b in pairwise(bounds)}
    if min(size // min(config.accumulate, size) for size in sizes) > 1:
        return 1
    trial = Trial(task, config)
    faults = [trial.training_fault(data, [place]) for place in spread(len(data), TRIED)]
    fault = faults[0]
    if not all(faults) or trial.training_fault(data, [0, len(data) - 1]):
        return 1  # what fails with two examples too has another cause, which training will tell
    why = f"and {_batch_norms(trial.model)} cannot train on one ({fault})"
    if len(data) == 1:
        mend = "give this agent more data, or raise task.partition.min_samples"
        raise DataError(f"task {task.name}: there is one example to train on, {why}; {mend}")
    if config.batch_size == 1:
        raise ConfigError(f"train.batch_size = 1 makes batches of one example, {why}; set it to 2 or more")
    whole = max(sizes)
    if whole // config.accumulate < 2:
        raise ConfigError(
            f"train.accumulate = {config.accumulate} cuts batches of {whole} into single examples, {why}; set "
            f"train.accumulate to {max(1, whole // 2)} at most"
        )
    return 2


def _batch_norms(model: nn.Module) -> str:
    found = [(name, type(module).__name__) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    return f"the model (with {found[0][1]} {found[0][0]!r})" if found else "the model"


def check_accumulate(task: Task, data: Data, config: TrainConfig) -> None:
    """Raise HookError if `train.accumulate` would change the training: if examples differ in their number of ignored
    labels, and nothing gives the weight of the loss of a part."""
    weighed = getattr(task, "loss_weight", None) is not None
    if config.accumulate > 1 and not weighed and (most := unevenly_ignored(task, data)) is not None:
        Trial(task, config).compare_parts(data, most)


# ── the whole task ───────────────────────────────────────────────────────────────────────────────────────────
def check_task(task: Task, config: TrainConfig, folder: Path = Path(), *, probe: bool = False) -> tuple[str, ...]:
    """Try a task on a few examples; return notes on oddities that may be intended. `folder`: that of an optimizer's
    hook; `probe`: the probe set is tried too.

    Raises HookError if the task's code fails, or returns something that the `Task` protocol does not allow; DataError
    that names the example if the data are at fault. No random stream is disturbed.
    """
    notes: list[str] = []
    check_names(task)
    device = resolve_device(config.device)
    with own_streams(seeded_streams(0, device), device):
        held: dict[Split, Data] = {"train": _data(task, "train", notes), "test": _data(task, "test", notes)}
        trial = Trial(task, config)
        found = {split: trial.look(split, data) for split, data in held.items()}
        trial.example_inputs()
        if probe:
            trial.probe()
        _check_metrics(task, found["test"], notes)
        trial.train(held["train"], notes, folder)
    return tuple(notes)


def _data(task: Task, split: Split, notes: list[str]) -> Data:
    """Return a split, after checking its length and labels."""
    with task_errors(task):
        data: Any = task.data(split)
        count, labels = len(data), data.labels
    where = f'task {task.name}: data("{split}")'
    if count == 0:
        raise DataError(f"{where} is empty; check where it is read from")
    if labels is None:
        return data
    if not isinstance(labels, Tensor) or labels.dtype not in INTEGERS:
        odd = ""
        if isinstance(labels, Tensor) and labels.is_floating_point() and (lost := labels.isnan().flatten()).any():
            odd = f"; label {int(lost.nonzero()[0])} is NaN, {int(lost.sum())} in all: leave these examples out"
        raise DataError(f"{where}.labels are {described(labels)}; give classes as int64, or None{odd}")
    if labels.shape != (count,):
        raise DataError(f"{where}.labels have shape {tuple(labels.shape)} for {count} examples; one class for each")
    if labels.device.type != "cpu":
        raise DataError(f"{where}.labels lie on {labels.device}; keep them on the CPU")
    classes = len(task.classes)
    for place, largest in ((int(labels.argmin()), False), (int(labels.argmax()), True)):
        label = int(labels[place])
        if label < 0 or (largest and classes and label >= classes):
            known = f"0 … {classes - 1}, the task's {classes} classes" if classes else "0, 1, 2, …"
            raise DataError(f"{where}, example {place}: label {label} is none of {known}; mend the data or the classes")
    if split == "train" and count > 1 and int(labels.min()) == int(labels.max()) and classes != 1:
        notes.append(f"{where}: all {count} examples are of class {int(labels[0])}")
    return data


def _check_metrics(task: Task, found: Mapping[str, float], notes: list[str]) -> None:
    names = [name for name in found if name != "loss"]
    if task.metric not in found:
        known = f"metrics() returns {', '.join(names) or 'none'}"
        raise HookError(
            f"task {task.name}: its metric {task.metric!r} is none of its metrics{nearest(task.metric, names)}; {known}"
        )
    notes += [
        f"task {task.name}: {name} is {value} on test data before training"
        for name, value in found.items()
        if value != value or value in (float("inf"), float("-inf"))
    ]


class Trial:
    """A task with a temporary model; everything runs as in training, on the same device."""

    def __init__(self, task: Task, config: TrainConfig) -> None:
        self.task = task
        self._config = config
        self._device = resolve_device(config.device)
        with task_errors(task, "build_model()"):
            self.model = task.build_model(torch_generator(0, "contract")).to(self._device)
        self._step: Callable[[nn.Module, Batch], Tensor] | None = getattr(task, "train_step", None)

    # ── as in evaluation ─────────────────────────────────────────────────────────────────────────────────────
    def example_inputs(self) -> None:
        """Run the model on the task's example inputs."""
        with task_errors(self.task, "example_inputs()"):
            inputs: Any = self.task.example_inputs()
        if not isinstance(inputs, tuple | list) or not all(isinstance(t, Tensor) for t in cast("list[Any]", inputs)):
            mend = "return a tuple of tensors"
            raise HookError(f"task {self.task.name}: example_inputs() returned {described(inputs)}; {mend}")
        with eval_mode(self.model), torch.no_grad():
            self._outputs(tuple(tensor.to(self._device) for tensor in cast("list[Tensor]", inputs)))

    def probe(self) -> None:
        """Run the model on a few inputs of the probe set."""
        with task_errors(self.task, 'data("probe")'), eval_mode(self.model), torch.no_grad():
            if places := spread(len(data := self.task.data("probe")), TRIED):  # an empty one may be a fault, or not
                self._outputs(self._read(data, places).inputs)

    def look(self, split: Split, data: Data) -> dict[str, float]:
        """Evaluate an ordinary batch and the examples that may be at fault; return the means over them."""
        odd = witnesses(self.task, data)
        ordinary = [place for place in spread(len(data), TRIED + len(odd)) if place not in odd][:TRIED]
        everything = [*ordinary, *odd]
        if len(everything) == len(self.task.classes):  # one number a class must not pass for one an example
            everything.append(everything[0])
        fault: DimatError | None = None
        try:
            means = self._evaluate(data, everything)
            if all(map(isfinite, means.values())):
                return means
        except DimatError as error:
            fault = error
        # which one is it? Two alike are taken, for code that takes a batch of one for something else
        try:
            means = self._evaluate(data, [ordinary[0], ordinary[-1]]) if ordinary else {}
        except DimatError as error:  # whichever is taken
            # labels that are missing make floats of all, which is why a loss may fail for each
            lost = next((f"example {place}: {why}" for place, why in odd.items() if why.startswith(LOST)), "")
            if lost:
                where = f'task {self.task.name}: data("{split}"), {lost}'
                raise DataError(f"{where}; leave such examples out. {fault or error}") from error
            raise (fault or error) from None
        for place, why in odd.items():
            where = f'task {self.task.name}: data("{split}"), example {place}: {why}'
            try:
                alone = self._evaluate(data, [place, place])
            except DimatError as error:
                raise DataError(f"{where}: {error}") from error
            lost = [name for name, value in alone.items() if not isfinite(value) and isfinite(means.get(name, 0.0))]
            if lost:
                raise DataError(
                    f"{where}, so that its {' and '.join(lost)} {'is' if len(lost) == 1 else 'are'} not finite; "
                    "mend the data, or leave such examples out of them, or of the loss and the metrics"
                )
        if fault is not None:
            raise fault
        return means

    def _evaluate(self, data: Data, places: Sequence[int]) -> dict[str, float]:
        batch = self._read(data, places)
        with eval_mode(self.model), torch.no_grad(), autocast(self._config.precision, self._device):
            outputs = self._outputs(batch.inputs)
            given = f"the model returned {described(outputs)}, targets are {described(batch.targets)}"
            self._check_classes(outputs, batch.targets)
            with task_errors(self.task, f"loss() ({given})"):
                loss = checked_loss(self.task, self.task.loss(outputs, batch.targets))
            with task_errors(self.task, f"metrics() ({given})"):
                metrics = checked_metrics(self.task, self.task.metrics(outputs, batch.targets), len(places))
            means = {name: float(value.double().mean()) for name, value in metrics.items()}
            weight = loss_weight(self.task, batch.targets)
        means = {"loss": float(loss) if weight else 0.0, **means}
        derived: Any = getattr(self.task, "derived_metrics", None)
        if derived is None:
            return means
        with task_errors(self.task, "derived_metrics()"):
            return {**means, **{str(name): float(value) for name, value in derived(means).items()}}

    def _check_classes(self, outputs: Any, targets: Tensor) -> None:
        """Raise DataError for a label without an output; on a GPU it would make the process unusable."""
        logits: Any = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
        if not self.task.classes or not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
            return
        if targets.ndim == 1 and not targets.is_floating_point() and int(targets.max()) >= logits.shape[1]:
            raise DataError(
                f"task {self.task.name}: label {int(targets.max())} has no output of the model, which has "
                f"{logits.shape[1]}; give it one for each of the {len(self.task.classes)} classes"
            )

    # ── as in training ───────────────────────────────────────────────────────────────────────────────────────
    def train(self, data: Data, notes: list[str], folder: Path) -> None:
        """Make a step with a batch, and check that parts of it have the same gradients."""
        places = (spread(len(data), TRIED) * TRIED)[:TRIED]
        batch = self._read(data, places)
        self.model.train()
        config, scaler = self._config, torch.amp.GradScaler(self._device.type, enabled=self._config.precision == "fp16")

        def backward() -> tuple[Tensor, float]:
            loss = self._loss(batch)
            if not loss.isfinite():
                raise HookError(
                    f"task {self.task.name}: the loss is {float(loss.detach())} before any training; check loss(), the "
                    "scale of the inputs, and train.precision"
                )
            with task_errors(self.task, "the gradient of the loss"):
                scaler.scale(loss).backward()
            if not scaler.is_enabled():  # scaled gradients may overflow, and the step is left out then
                self._check_gradients()
            return loss.detach(), 1.0

        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise HookError(f"task {self.task.name}: its model has no parameter that requires a gradient; leave some")
        made = build_optimizer(self.model, config.optimizer, precision=config.precision, folder=folder)
        with own_streams(seeded_streams(0, self._device), self._device), task_errors(self.task, "train.optimizer"):
            Stepper(self.model, made, config, scaler).step(backward)
        self.model.zero_grad()
        with eval_mode(self.model):
            self._compare_parts(batch, notes)

    def _check_gradients(self) -> None:
        for name, parameter in self.model.named_parameters():
            grad = parameter.grad
            if grad is not None and not (grad.to_dense() if grad.is_sparse else grad).isfinite().all():
                raise HookError(
                    f"task {self.task.name}: the gradient of {name} is not finite after one batch, and its loss is; "
                    "look for a root or a logarithm of 0, or a division by it"
                )

    def training_fault(self, data: Data, places: Sequence[int]) -> str:
        """Return why a loss in training mode cannot be computed on these examples; "" if it can."""
        with own_streams(seeded_streams(0, self._device), self._device):
            batch = self._read(data, places)
            self.model.train()
            try:
                loss = self._loss(batch)
            except DimatError as error:
                return first_line(error.__cause__ or error)
            return "" if loss.isfinite() else f"its loss is {float(loss.detach())}"

    def compare_parts(self, data: Data, places: tuple[int, int]) -> None:
        """Check that the loss of two examples, each taken twice, is the mean of their losses."""
        batch = self._read(data, [places[0]] * 2 + [places[1]] * 2)
        with own_streams(seeded_streams(0, self._device), self._device), eval_mode(self.model):
            self._compare_parts(batch, [])

    def _compare_parts(self, batch: Batch, notes: list[str]) -> None:
        """Check that a batch's loss is the mean of its parts', or may be intended to differ."""
        half = len(batch.targets) // 2
        parts = [Batch(tuple(t[a:b] for t in batch.inputs), batch.targets[a:b]) for a, b in ((0, half), (half, None))]
        weights = [loss_weight(self.task, part.targets) for part in parts]
        if 0 in weights:
            return
        whole = self._gradients(batch)
        one, two = (self._gradients(part) for part in parts)
        share = weights[0] / sum(weights)
        close = HALF_TOLERANCE if self._config.precision in AUTOCAST else TOLERANCE

        def same(others: list[Tensor]) -> bool:
            return alike([*whole.values()], others, close)

        if same([a * share + b * (1 - share) for a, b in zip(one.values(), two.values(), strict=True)]):
            return
        if not same([*self._gradients(batch, seed=1).values()]):
            return  # it is drawn anew at each call, and parts cannot be told from the whole by it
        if same([a + b for a, b in zip(one.values(), two.values(), strict=True)]):
            raise HookError(
                f"task {self.task.name}: the loss is the sum over a batch, so that the learning rate would depend on "
                "its size; return the mean, e.g. by .mean()"
            )
        with torch.no_grad():
            outputs: Any = self._outputs(batch.inputs)
        shapes = {outputs.shape, batch.targets.shape} if isinstance(outputs, Tensor) else set[torch.Size]()
        if shapes == {torch.Size([2 * half]), torch.Size([2 * half, 1])}:
            raise HookError(
                f"task {self.task.name}: the loss compares each of the outputs, {described(outputs)}, with each of the "
                f"targets, {described(batch.targets)}; bring them to one shape, e.g. by outputs.squeeze(1)"
            )
        if self._config.accumulate > 1:
            raise HookError(unlike_parts(self.task))
        if batch.targets.is_floating_point() or not (batch.targets < 0).any():
            notes.append(
                f"task {self.task.name}: the loss of a batch is not the mean of its examples' losses; right for a loss "
                "that compares examples with each other, else look at the shapes in it"
            )

    def _gradients(self, batch: Batch, seed: int = 0) -> dict[str, Tensor]:
        """Return gradients by parameter, for enough parameters to tell one loss from another."""
        asked = _last({name: p for name, p in self.model.named_parameters() if p.requires_grad}, COMPARED)
        with own_streams(seeded_streams(seed, self._device), self._device):
            loss = self._loss(batch)
            with task_errors(self.task, "the gradient of the loss"):
                grads = torch.autograd.grad(loss, [*asked.values()], allow_unused=True, materialize_grads=True)
        return {n: g.to_dense() if g.is_sparse else g for n, g in zip(asked, grads, strict=True)}

    def _loss(self, batch: Batch) -> Tensor:
        with autocast(self._config.precision, self._device):
            if self._step is not None:
                with task_errors(self.task, "train_step()"):
                    return checked_loss(self.task, self._step(self.model, batch), "train_step()", trained=True)
            outputs = self._outputs(batch.inputs)
            with task_errors(self.task, "loss()"):
                return checked_loss(self.task, self.task.loss(outputs, batch.targets), trained=True)

    # ── both ─────────────────────────────────────────────────────────────────────────────────────────────────
    def _outputs(self, inputs: tuple[Tensor, ...]) -> Any:
        given = ", ".join(map(described, inputs))
        hint = "; give float32" if any(tensor.dtype == torch.float64 for tensor in inputs) else ""
        with (
            task_errors(self.task, f"the model, on inputs {given}{hint}"),
            autocast(self._config.precision, self._device),
        ):
            return self.model(*inputs)

    def _read(self, data: Data, places: Sequence[int]) -> Batch:
        indices = torch.tensor(places, dtype=torch.int64)
        with task_errors(self.task, f"data.batch() for examples {list(places)} of {len(data)}"):
            batch = checked_batch(self.task, data.batch(indices), len(indices), "data.batch()")
        return Batch(tuple(tensor.to(self._device) for tensor in batch.inputs), batch.targets.to(self._device))


def _last(parameters: Mapping[str, nn.Parameter], entries: int) -> dict[str, nn.Parameter]:
    """Return the last parameters, with about `entries` entries in all."""
    chosen: dict[str, nn.Parameter] = {}
    for name in reversed([*parameters]):
        if parameters[name].numel() <= entries:
            chosen[name] = parameters[name]
            entries -= parameters[name].numel()
    return chosen or dict([min(parameters.items(), key=lambda item: item[1].numel())])
