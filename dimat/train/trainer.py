"""Local training between merges: one agent's model, optimizer and random streams.

A `Trainer` knows nothing of peers or rounds beyond their number. All its randomness comes from streams derived from one
seed and is part of its state, so training resumed from a state continues bit for bit, and draws made elsewhere in the
process change nothing. State is plain tensors and plain values; nothing is pickled.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dimat.config import DistilConfig, TrainConfig
from dimat.device import autocast, current_streams, own_streams, resolve_device, seeded_streams
from dimat.errors import DataError, TrainingError
from dimat.merge.models.functional import call_with
from dimat.seeds import derive_seed, torch_generator
from dimat.symmetry.trace import eval_mode
from dimat.tasks.base import Batch, Data, Task
from dimat.tasks.data import InputBatches, input_batches
from dimat.train.base import TrainerState, TrainReport, Value
from dimat.train.batch_feed import BatchFeed, parts_of
from dimat.train.check_task import check_accumulate, check_sizes
from dimat.train.contract import check_parts, checked_loss, loss_weight, task_errors
from dimat.train.evaluation import evaluate
from dimat.train.lesson import Lesson, Teaches, check_teachable
from dimat.train.losses import LocalLoss
from dimat.train.model_state import ModelState, check_whole
from dimat.train.optimizer_state import optimized
from dimat.train.optimizers import build_optimizer, lr_factor
from dimat.train.progress import Interrupts, Progress, TrainingInterruptedError, round_steps
from dimat.train.round_start import RoundStart
from dimat.train.stepper import Stepper


class Trainer(ModelState):
    """Trains one agent's model on its own data.

    `seed` and `path` name the agent's random streams (see `dimat.seeds`): equal ones give bit-equal training, including
    the initialisation (with `initialisation = "shared"` that depends on `seed` alone). `rounds_total` is the length of
    the run, for learning rate schedules; `folder`: where an optimizer's hook is looked up; `reference`: class shares
    with which those of the data are compared if `train.loss` is "auto" (see `LocalLoss`). Raises ConfigError for an
    unusable device, optimizer or model, and if batches or their parts would be smaller than the model can train on;
    DataError for empty data. Errors of the task's own code, in training or evaluation, become HookError.
    """

    def __init__(
        self,
        task: Task,
        data: Data,
        config: TrainConfig,
        *,
        seed: int,
        path: Sequence[str | int] = (),
        rounds_total: int = 1,
        folder: Path = Path(),
        reference: Tensor | None = None,
    ) -> None:
        if len(data) == 0:
            raise DataError("no samples to train on; check the partition")
        self._least = check_sizes(task, data, config)
        check_accumulate(task, data, config)
        self.task = task
        self.data = data
        self.config = config
        self.rounds_total = rounds_total
        self._folder = folder
        self.device = resolve_device(config.device)
        origin = path if config.initialisation == "own" else ()
        built = task.build_model(torch_generator(seed, *origin, "init"))
        check_whole(built)
        self.model = built.to(self.device)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self._renew_optimizer()
        self.samples_seen = 0
        """Training examples seen since the start, with repeats."""
        self._global_rng = seeded_streams(derive_seed(seed, *path, "dropout"), self.device)
        order, augment = (torch_generator(seed, *path, name) for name in ("batches", "augment"))
        self._feed = BatchFeed(task, data, config.batch_size, self.device, order, augment)
        self.interrupts: Interrupts | None = None
        self._progress: Progress | None = None  # of the round that is being trained, or was broken off
        self._step: Any = getattr(task, "train_step", None)
        self.loss = LocalLoss.of(config.loss, task, data, reference)
        self._start = RoundStart()
        self._lesson: Teaches | None = None  # while it is taught by other models

    # --- training ---

    def steps_in(self, round: int) -> int:
        """Return the number of optimizer steps of a round (rounds count from 1)."""
        return round_steps(self.config, self.batches, round)

    @property
    def batches(self) -> int:
        """Batches in an epoch."""
        return self._feed.batches

    def train(self, round: int) -> TrainReport:
        """Train for one round and report loss, samples, steps and seconds.

        An interrupted round (`interrupts`, which raise TrainingInterruptedError) is continued. Raises TrainingError
        naming round and step if the loss is no longer finite; the weights are then unusable.
        """
        progress = self._progress
        if progress is None:
            progress = Progress(round, self.steps_in(round), self.batches)
            if self.config.optimizer_state == "fresh":
                self._renew_optimizer()
            self._start = RoundStart.of(self.model, self.config.proximal, teaches=self._teaches(round))
        cpu, wall = time.process_time(), time.perf_counter()
        self._progress = None  # a round that fails is not gone on with
        with own_streams(self._global_rng, self.device), task_errors(self.task, f"training in round {round}"):
            finished = self._train(round, progress)
        if not finished:
            self._progress = progress
            raise TrainingInterruptedError(f"round {round}, step {progress.done} of {progress.steps}")
        self._start = RoundStart()
        return self._report(round, progress, cpu, wall)

    def distil(self, round: int, teachers: Sequence[Mapping[str, Tensor]], config: DistilConfig) -> TrainReport:
        """Train on own examples and on teachers' outputs for them (`Lesson`), between two rounds.

        `teachers`: whole state dicts. Raises ConfigError where the task has no logits to teach, TrainingError as
        `train` does.
        """
        check_teachable(self.task, 'schedule.first_merge = "adopt-distil"')
        own = self.model.state_dict()
        here = [{name: each[name].to(self.device, own[name].dtype) for name in own} for each in teachers]
        return self.learn(round, Lesson(here, config), config.steps)

    def learn(self, round: int, lesson: Teaches, steps: int) -> TrainReport:
        """Train on own examples and by a lesson, between two rounds.

        Batches, augmentation and dropout continue the agent's streams; it cannot be interrupted. Raises TrainingError
        as `train` does.
        """
        progress = Progress(round, steps, self.batches)
        cpu, wall = time.process_time(), time.perf_counter()
        interrupts, self.interrupts = self.interrupts, None  # a state of its middle would be taken for the round's
        self._lesson = lesson
        try:
            with own_streams(self._global_rng, self.device), task_errors(self.task, f"distillation in round {round}"):
                self._train(round, progress)
        finally:
            self.interrupts, self._lesson = interrupts, None
        return self._report(round, progress, cpu, wall)

    def _report(self, round: int, progress: Progress, cpu: float, wall: float) -> TrainReport:
        """Finish training: check weights, count examples, report."""
        loss = progress.loss / progress.counted if progress.counted else math.nan
        self._check_weights(round)
        if self.config.optimizer_state == "fresh":
            self.clear_optimizer()
        self.samples_seen += progress.samples
        used = time.process_time() - cpu, time.perf_counter() - wall
        return TrainReport(loss, progress.samples, progress.steps, *used)

    def _train(self, round: int, progress: Progress) -> bool:
        """Train for the rest of a round; return whether it was completed."""
        self.model.train()
        self._stepper.start = self._start
        factors = self._lr_factors(round, progress.steps)
        goes_on = True
        while goes_on and progress.done < progress.steps:
            batches = self._feed.gather(progress)
            losses: list[tuple[Tensor, float]] = []
            for batch in batches:
                if factors is not None:
                    self._stepper.set_rates(factors[progress.done + len(losses)])
                losses.append(self._stepper.step(partial(self._backward, batch)))
                if self.interrupts is not None and self.interrupts.due():
                    self._count(round, progress, losses, batches)
                    batches, losses = batches[len(losses) :], []
                    if self._pause(self.interrupts, progress):
                        goes_on = False
                        break
            self._count(round, progress, losses, batches)
            progress.within = progress.within if batches[len(losses) :] else 0
        self.optimizer.zero_grad()  # gradients would double what many simulated agents hold
        return goes_on

    def _pause(self, interrupts: Interrupts, progress: Progress) -> bool:
        """Let the trainer's current state be taken; return whether training is interrupted."""
        self._global_rng.update(current_streams(self.device))
        self._progress = progress
        try:
            return interrupts.pause()
        finally:
            self._progress = None

    def _count(
        self, round: int, progress: Progress, losses: Sequence[tuple[Tensor, float]], batches: Sequence[Batch]
    ) -> None:
        """Count steps whose weighted losses were not read yet; reading every step would make a GPU wait."""
        values: list[float] = torch.stack([loss for loss, _ in losses]).tolist() if losses else []
        for value, (_, weight), batch in zip(values, losses, batches, strict=False):
            progress.done += 1
            progress.within += 1
            if not math.isfinite(value):
                raise TrainingError(
                    f"training loss is {value} in round {round}, step {progress.done} of {progress.steps}; lower "
                    "train.optimizer.lr or set train.grad_clip_norm, and check the data for non-finite inputs"
                )
            progress.loss += value * weight
            progress.counted += weight
            progress.samples += len(batch.targets)

    def _backward(self, batch: Batch) -> tuple[Tensor, float]:
        """Add the gradients of a batch's mean loss, part by part; return that loss and its weight."""
        parts = parts_of(batch, self.config.accumulate, self._least)
        weights = [loss_weight(self.task, part.targets) for part in parts]
        whole = sum(weights)
        watched = len(parts) > 1 and self._step is None and self.samples_seen < len(self.data)
        before: tuple[Any, Tensor] | None = None
        total: Tensor | None = None
        for part, weight in zip(parts, weights, strict=True):
            if weight == 0:
                continue  # a mean over no label is no number
            loss, outputs = self._loss(part)
            if watched:
                here = (outputs, part.targets)
                if before is not None:
                    with autocast(self.config.precision, self.device):
                        check_parts(self.task, [before, here])
                before = here
            if len(parts) > 1:
                loss = loss * (weight / whole)
            (self._scaler.scale(loss) if self._scaler.is_enabled() else loss).backward()
            total = loss.detach() if total is None else total + loss.detach()
        return torch.zeros((), device=self.device) if total is None else total, whole

    def _loss(self, batch: Batch) -> tuple[Tensor, Any]:
        """Return a batch's loss, and the model's outputs if the task has no training step of its own."""
        with autocast(self.config.precision, self.device):
            if self._step is not None:
                return checked_loss(self.task, self._step(self.model, batch), "train_step()", trained=True), None
            outputs: Any = self.model(*batch.inputs)
            loss = self.loss(outputs, batch.targets, self._taught(batch))
            if self._lesson is not None:
                loss = self._lesson(self.task, self.model, batch, outputs, loss)
            return checked_loss(self.task, loss, trained=True), outputs

    def _teaches(self, round: int) -> bool:
        return self.loss.teaches and round > 1  # at the first, nobody has learned anything to hold on to

    def _taught(self, batch: Batch) -> Any:
        """Return the teacher's outputs for a batch, None if there is no teacher."""
        if not self._start.teacher:
            return None
        with torch.no_grad(), eval_mode(self.model):
            return call_with(self.model, self._start.teacher, batch.inputs)

    def _lr_factors(self, round: int, steps: int) -> list[float] | None:
        """Return the factor on the learning rate in each step of a round, or None if it never changes."""
        schedule = self.config.lr_schedule
        if schedule.name == "constant":
            return None
        # Placed by the round's number and not by steps done, so that a late joiner anneals with the others.
        first, later = self.steps_in(1), self.steps_in(2)
        before = 0 if round == 1 else first + (round - 2) * later
        total = first + (self.rounds_total - 1) * later
        return [lr_factor(schedule, min(1.0, (before + i) / total)) for i in range(steps)]

    def _check_weights(self, round: int) -> None:
        parameters = dict(self.model.named_parameters())
        if not torch.stack([p.detach().sum() for p in parameters.values()]).isfinite().all():
            bad = [name for name, p in parameters.items() if not p.isfinite().all()]
            if bad:
                raise TrainingError(
                    f"weights are not finite after round {round}: {', '.join(bad[:3])}; lower train.optimizer.lr or "
                    "set train.grad_clip_norm"
                )

    # --- evaluation ---

    def evaluate(self, data: Data, weights: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """Return the means over `data` of the loss ("loss") and of the task's metrics (`dimat.train.evaluation`).

        With `weights` (a full state dict), those are evaluated and the model keeps its own.
        """
        size, precision = self.config.eval_batch_size, self.config.precision
        return evaluate(self.task, self.model, data, weights, batch_size=size, precision=precision, device=self.device)

    def input_batches(
        self, data: Data, batch_size: int, generator: torch.Generator | None = None, *, samples: int | None = None
    ) -> InputBatches:
        """Return inputs of `data` on this trainer's device, as a re-iterable of tuples: without augmentation, in one
        fixed order drawn from `generator` (without one, that of the data), the first `samples` of them."""
        return input_batches(data, batch_size, generator, samples=samples, device=self.device)

    # --- state ---

    def state(self, *, copy: bool = True) -> TrainerState:
        """Return everything that is needed to continue bit for bit, on the CPU: as copies, or with `copy` false as
        tensors that change with the model and its optimizer."""
        tensors = {f"model/{name}": tensor for name, tensor in self.weights(copy=copy).items()}
        values: dict[str, Value] = {
            "optimizer": self.config.optimizer.name,
            "position": self._feed.position,
            "rows": len(self.data),
            "batches": self.batches,
            "samples_seen": self.samples_seen,
        }
        state, texts = self.optimizer_state(copy=copy)
        tensors |= state
        values |= texts
        tensors |= {f"rng/{name}": state.clone() for name, state in self._global_rng.items()}
        tensors |= self._feed.tensors()
        values |= {f"scaler/{key}": value for key, value in self._scaler.state_dict().items()}
        if self._progress is not None:
            tensors |= self._progress.tensors()
            values |= self._progress.values()
            tensors |= self._start.tensors()
        return TrainerState(tensors, values)

    def load_state(self, state: TrainerState, *, new_epoch: bool = False) -> None:
        """Continue from the state of a trainer with the same task, data and configuration. `new_epoch`: with other
        data, or batches of another size; the rest of the state's epoch is dropped.

        Raises DataError if something is missing or does not fit; a GPU's random stream is needed only on a GPU.
        """
        tensors, values = state.tensors, state.values
        start = RoundStart()
        try:
            progress = self._middle(Progress.of(tensors, values), new_epoch=new_epoch)
        except KeyError as error:
            raise DataError(f"the trainer's state lacks {error.args[0]!r}") from error
        if progress is not None:
            number = progress.number
            asked = self._teaches(number)
            start = RoundStart.load(tensors, self.model, self.config.proximal, teaches=asked, number=number)
        # states of older versions tell neither
        rows, batches = values.get("rows", len(self.data)), values.get("batches", self.batches)
        if (rows, batches) != (len(self.data), self.batches) and not new_epoch:
            raise DataError(
                f"the state is of {rows} examples in {batches} batches, this trainer has {len(self.data)} in "
                f"{self.batches}; give the same data and train.batch_size, or begin a new epoch "
                "(load_state(state, new_epoch=True))"
            )
        try:
            if values["optimizer"] != self.config.optimizer.name:
                raise DataError(
                    f"the state is of optimizer {values['optimizer']!r}, train.optimizer is "
                    f"{self.config.optimizer.name!r}"
                )
            self.load_weights({n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")})
            self.load_optimizer(tensors, values)
            for name in self._global_rng:
                self._global_rng[name] = tensors[f"rng/{name}"].clone()
            self._feed.load(tensors, 0 if new_epoch else int(values["position"]))
            self.samples_seen = int(values["samples_seen"])
            scaler = {n.removeprefix("scaler/"): v for n, v in values.items() if n.startswith("scaler/")}
            if self._scaler.is_enabled():
                self._scaler.load_state_dict(scaler)
            self._progress, self._start = progress, start
        except KeyError as error:
            raise DataError(f"the trainer's state lacks {error.args[0]!r}") from error

    def _middle(self, progress: Progress | None, *, new_epoch: bool) -> Progress | None:
        """Return the progress of a state's round; DataError if a round here differs, and no new epoch begins."""
        if progress is not None and new_epoch:
            progress.steps, progress.batches, progress.within = self.steps_in(progress.number), self.batches, 0
        here = None if progress is None else (self.steps_in(progress.number), self.batches)
        if progress is not None and here != (progress.steps, progress.batches):
            raise DataError(
                f"the state is of the middle of round {progress.number}, which had {progress.steps} steps with "
                f"{progress.batches} batches an epoch; it has {here[0] if here else 0} with {self.batches} now"
            )
        return progress

    def _new_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        made = build_optimizer(self.model, config.optimizer, precision=config.precision, folder=self._folder)
        optimized(self.model, made)  # raises where a hook's optimizer is another model's
        self._stepper = Stepper(self.model, made, config, self._scaler)
        return made
