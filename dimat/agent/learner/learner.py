"""The learner: one agent's model, optimizer and data, and what a round does with them.

It trains, records snapshots, adopts a basis and merges, and knows no peers beyond the files of their snapshots. Every
driver (simulator, daemon) has one per agent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field, replace
from math import isfinite, nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dimat.agent.learner.checkpoint import Checkpoint
from dimat.agent.learner.first_merge import FirstMerge
from dimat.agent.learner.own_data import compare_data, describe_data
from dimat.agent.learner.own_norms import OwnNorms
from dimat.agent.learner.recorder import Recorder
from dimat.agent.learner.shared_base import load_base, plan_for
from dimat.agent.learner.shared_moments import SharedMoments
from dimat.agent.learner.statistics import take_statistics
from dimat.agent.protocol.messages import MergeAction, Moves
from dimat.agent.protocol.state import MachineState
from dimat.config import ExperimentConfig
from dimat.errors import DataError, DimatError, MergeError, PeerError
from dimat.events import WARNING, MergeResult, TrainResult
from dimat.merge import MergeContext, MergePlan, Peer, adopt, merge, needs_symmetry, open_weights
from dimat.merge.growth import HORIZON
from dimat.merge.matching.assignment import moved_by_group, moved_share
from dimat.merge.moments import PREFIXES
from dimat.merge.natures import natures_of
from dimat.merge.pipeline import NOT_KEPT
from dimat.merge.registry import repair_registry
from dimat.merge.screen import norm_of, norms_of, screen
from dimat.merge.shared_statistics import OWN, apart, beside, permuted
from dimat.merge.stages import Weights
from dimat.seeds import torch_generator
from dimat.symmetry import Observer, SymmetrySpec
from dimat.tasks import Subset
from dimat.tasks.base import Data, Task
from dimat.train.base import ModelTrainer
from dimat.train.losses import class_counts
from dimat.train.trainer import Trainer
from dimat.weights.snapshot import RecordedSnapshot
from dimat.weights.tensors import schema_hash, write_weights

HOLD_OUT = 0.1  # share of an agent's samples that `accept = no-worse` on "local" keeps from training


@dataclass(slots=True)
class Learner:
    """One agent: its trainer, its part of the data, and its merge pipeline.

    `indices`: the agent's samples in the task's training split; `store`: folder of the snapshots; `spec`: symmetry
    groups of the task's model, None where the merge needs none (`needs_symmetry`); `observers`: traced models, which
    agents of one process may share because tracing takes longer than a merge.
    """

    name: str
    config: ExperimentConfig
    task: Task
    indices: Tensor
    store: Path
    spec: SymmetrySpec | None
    durable: bool = True
    observers: dict[str, Observer] = field(default_factory=dict[str, Observer])
    method: dict[str, Any] = field(default_factory=dict[str, Any])
    """State that the merge method carries from merge to merge: tensors and plain values by name."""
    part: str = ""
    """What decides which samples are the agent's (`own_data.part_of`)."""
    custom_trainer: InitVar[ModelTrainer | None] = None
    """Trains the model, where it is not to be a `Trainer` made of task and configuration."""
    trainer: ModelTrainer = field(init=False)
    base: dict[str, Tensor] | None = field(init=False)
    """Weights that task vectors are taken from, where the configuration names any."""
    _plan: MergePlan = field(init=False)
    _norms: OwnNorms = field(init=False)
    doubt: tuple[int, int] = field(init=False, default=(0, 0))
    """Rounds of the first and the last doubtful merge that weights rest on; 0 for none."""
    _statistics: dict[str, Tensor] = field(init=False, default_factory=dict[str, Tensor])
    """Statistics that merges rest on, from the end of training to the merge; in the weights' basis."""
    _moments: SharedMoments | None = field(init=False, default=None)
    """The optimizer's moments, where they are sent beside the weights and merged."""
    _first: FirstMerge = field(init=False)
    _hold_out: Data | None = field(init=False, default=None)
    _own: Data = field(init=False)
    _recorder: Recorder = field(init=False)
    _samples: int = field(init=False, default=0)
    """Examples of the last training."""
    _learned: bool = field(init=False, default=False)
    """Whether the weights are those of a training, and not of a merge."""
    _unsaid: tuple[str, ...] = field(init=False, default=())
    """Notes for people that go with the next training."""

    def __post_init__(self, custom_trainer: ModelTrainer | None) -> None:
        config = self.config
        self._recorder = Recorder(self.store, config.exchange, durable=self.durable)
        self._plan = plan_for(config.merge, self.task)
        self.base = load_base(config, self.task)
        train = self.task.data("train")
        indices = self.indices
        if self._plan.accept.name == "no-worse" and self._plan.accept.settings["on"] == "local":
            order = torch.randperm(len(indices), generator=torch_generator(config.seed, "hold-out", self.name))
            cut = max(1, int(len(indices) * HOLD_OUT))
            self._hold_out = Subset(train, indices[order[:cut]])
            indices = indices[order[cut:]]
        self._own = Subset(train, indices)
        self._check_sets()
        self.trainer = custom_trainer or self._new_trainer(train)
        self._norms = OwnNorms(self.trainer, used=not self._plan.keep_not_finite)
        if config.optimizer_state == "merged":
            self._moments = SharedMoments(self.trainer, config.exchange.moments, self._plan)
        self._first = FirstMerge(config.schedule)
        self._first.check(self.trainer)

    def _new_trainer(self, train: Data) -> Trainer:
        config = self.config
        # the skew of a part is measured against the whole; and who stands for all agents has the whole
        known = len(self.indices) < len(train) or config.merge.preset.ceiling
        trainer = Trainer(
            self.task,
            self._own,
            config.train,
            seed=config.seed,
            path=("agent", self.name),
            rounds_total=max(config.schedule.rounds, 1),
            folder=Path(config.folder),
            reference=class_counts(self.task, train) if known else None,
        )
        self._unsaid = (trainer.loss.note,) if trainer.loss.note else ()
        return trainer

    def _check_sets(self) -> None:
        """Raise DataError where a set of examples is too small for what is to be done with it."""
        plan, own = self._plan, len(self._own)
        if self._hold_out is not None and own == 0:
            raise DataError(
                f'agent {self.name} has {len(self.indices)} example, which accept = "no-worse" on "local" keeps from '
                "training; give it more data, or judge merges on the probe set"
            )
        if (needs_symmetry(plan) or plan.repair.name != "none") and (count := len(self._shared_inputs())) < 2:
            what = "the probe set" if plan.align_data == "probe" else f"the data of agent {self.name}"
            raise DataError(
                f"{what} has fewer than the two examples ({count}) that comparing networks or re-estimating BatchNorm "
                'takes; give more, or set merge.align_data to "local" or "probe", whichever has them'
            )
        if self._score_asked() and self._hold_out is None and len(self._probe()) == 0:
            raise DataError("the probe set is empty, and merges are judged on it; give examples")

    def train(self, number: int, learn: bool = True) -> TrainResult:
        """Train for a round (not if `learn` is false), and take the merge method's statistics."""
        before = self._norms.now() if self._norms.norms else {}
        moments_before = self._moments.norms_now() if self._moments is not None else {}
        start = time.thread_time()
        report = self.trainer.train(self.config.schedule.round_of(number)) if learn else None
        trained = time.thread_time()
        self._learned = report is not None
        self._norms.after_training(before)
        if self._moments is not None:
            self._unsaid += self._moments.after_training(moments_before)
        self._statistics = take_statistics(
            self._plan,
            self.task,
            self.trainer.model,
            self._own,
            self.config.train.eval_batch_size,
            torch_generator(self.config.seed, "statistics", self.name, number),
        )
        cpu_s = {"train": trained - start}
        if self._statistics:
            cpu_s["statistics"] = time.thread_time() - trained
        self._samples = report.samples if report is not None else 0
        loss = report.loss if report is not None else nan
        said, self._unsaid = self._unsaid, ()
        return TrainResult(loss=loss, samples=self._samples, notes=said, cpu_s=cpu_s)

    def record(self) -> RecordedSnapshot:
        """Record the current weights as a snapshot, in the encoding in which peers get them.

        DataError where it cannot be written; it may be tried again then.
        """
        weights = self.trainer.weights(copy=False)
        moments = self._moments.encoded() if self._moments is not None and self._learned else {}
        payload, forms = self._recorder.record(beside(weights, {**self._statistics, **moments}))
        return RecordedSnapshot(payload, forms, schema_hash(weights), self._samples)

    def adopt_weights(self, peer: str, snapshot: Path) -> str:
        """Take over a peer's weights whole.

        Returns why it could not be, with nothing changed, or an empty string.
        """
        weights, statistics, moments = self._open(snapshot)
        if fault := self._unfit(peer, weights):
            return fault
        try:
            if self._moments is not None:
                self._moments.check(peer, moments)
        except DimatError as error:
            return str(error)
        self.trainer.start_from({name: weights[name] for name in self.trainer.weights(copy=False)})
        if self._moments is not None and (note := self._moments.adopt(moments)):
            self._unsaid += (note,)
        self.method = {}  # what a merge method carries from merge to merge was of the weights before
        self._statistics = {name: tensor.clone() for name, tensor in statistics.items()}
        self._norms.begin()
        self._recorder.forget()
        return ""

    def _unfit(self, peer: str, weights: Weights) -> str:
        """Return why a peer's weights do not pass the screen, or an empty string."""
        own = self.trainer.weights(copy=False)
        natures = natures_of(own, self.trainer.model)
        try:
            screen(own, weights, peer, norm_of(own, natures), natures, self._norms.reference(), **self._plan.screen)
        except DimatError as error:
            return str(error)
        return ""

    def checkpoint(self, machine: MachineState) -> Checkpoint:
        """Return all that this agent needs to go on, with the round machine's state. Its tensors are the model's and
        the optimizer's own: it is to be written before they change."""
        tensors = {name: value for name, value in self.method.items() if isinstance(value, Tensor)}
        values = {name: value for name, value in self.method.items() if name not in tensors}
        return Checkpoint(
            machine,
            self.trainer.state(copy=False),
            self.schema(),
            tensors,
            values,
            self._statistics,
            self.data_now(),
            self._norms.norms,
            self.doubt,
            {} if self._moments is None else self._moments.norms,
        )

    def restore(self, checkpoint: Checkpoint) -> str:
        """Go on from a checkpoint; return why a new epoch begins with it, "" where the epoch goes on.

        DataError where it does not fit the task, its data or the training's settings.
        """
        note = ""
        if isinstance(self.trainer, Trainer):
            note = compare_data(checkpoint.data, self.data_now(), accepted=self.config.agent.accept_new_data)
            self.trainer.load_state(checkpoint.trainer, new_epoch=bool(note))
        else:
            self.trainer.load_state(checkpoint.trainer)
        self.method = {**checkpoint.method_tensors, **checkpoint.method_values}
        self._statistics = dict(checkpoint.statistics)
        self._norms.norms = dict(checkpoint.norms)
        self.doubt = checkpoint.doubt
        state = checkpoint.machine
        self._learned = state.stage == "trained" and self.config.schedule.learns(state.round)
        if self._moments is not None:
            self._moments.norms = dict(checkpoint.moment_norms) or self._moments.norms_now()
        return note

    def data_now(self) -> dict[str, int | float | str]:
        """Return what a checkpoint remembers of the data; nothing where the user's own loop reads them."""
        own = isinstance(self.trainer, Trainer)
        return describe_data(self._own, self.trainer.batches, self.part) if own else {}

    def schema(self) -> str:
        """Return the hash of the model's tensor names, shapes and types."""
        return schema_hash(self.trainer.model.state_dict())

    def adopt_basis(self, number: int, peer: str, snapshot: Path) -> Moves | None:
        """Permute weights, buffers and optimizer into the basis of a peer's snapshot, or take over its weights with it.

        Return which units moved. None, and nothing changed, where the snapshot is not fit to align to. Without symmetry
        groups nothing is permuted: all bases are one then.
        """
        if self._first.adopts(number):
            former = self.trainer.weights()
            if self.adopt_weights(peer, snapshot):
                return None  # the merge refuses this peer too, and says why
            self._first.took_over(former, peer)
            return Moves()
        if self.spec is None:
            return Moves()
        source = Peer(peer, self._open(snapshot)[0], weight=0.0)
        try:
            permutations = adopt(self.trainer.weights(copy=False), source, self._plan, self._context(number))
        except PeerError:
            return None  # the merge's own screen refuses this peer, and says why
        note = self.trainer.permute(self.spec, permutations)
        self._recorder.forget()  # in another order of units the change since the last snapshot is no small one
        self._statistics = dict(permuted(self._statistics, self.spec, permutations))
        return Moves(moved_share(permutations), moved_by_group(permutations), note)

    def merge(self, action: MergeAction, sources: Mapping[str, Path], evaluate: str) -> MergeResult:
        """Merge the agent's own weights with its peers' snapshots.

        `sources`: the snapshots' files, by peer; `evaluate`: "all" (test metrics before and after), "after" or "none";
        of several mixing steps before the first and after the last.
        """
        number, schedule = action.round, self.config.schedule
        first = schedule.begins_round(number)
        last = evaluate != "none" and schedule.ends_round(number)
        start = time.thread_time()
        before = self.evaluate(self._first.former) if evaluate == "all" and first else {}
        ready = time.thread_time()
        parts: list[Peer] = []
        statistics: dict[str, Weights] = {OWN: self._statistics}
        moments: dict[str, Weights] = {}
        for part in action.parts:
            weights, statistics[part.peer], moments[part.peer] = self._open(sources[part.peer])
            parts.append(Peer(part.peer, weights, part.weight, part.same_basis))
        parts, apart = self._first.split(action.round, parts)
        unfit = {peer.name: why for peer in apart if (why := self._unfit(peer.name, peer.weights))}
        aux = statistics if self._plan.statistics else None
        checks = None if self._moments is None else self._moments.checks(moments)
        context = self._context(action.round, aux, checks)
        own_weight = action.own_weight + sum(peer.weight for peer in apart)
        outcome = merge(self.trainer.weights(copy=False), own_weight, parts, self._plan_of(first), context)
        self.method = context.state or {}
        self._statistics = {}  # they are of the weights before
        changed = outcome.accepted > 0 and bool(outcome.mixing)
        held = outcome.weights
        if changed:
            self.trainer.exchange_weights(held)  # from here on own weights of before are held
        merged = time.thread_time()
        after = before if last else {}
        if last and (changed or self._first.former is not None or not before):
            after = self.evaluate()
        checked = changed and not self._plan.keep_not_finite
        lost = [name for name, value in after.items() if not isfinite(value)] if checked else []
        if lost:
            self.trainer.exchange_weights(held)
            before = before or self.evaluate()
            if any(isfinite(before.get(name, nan)) for name in lost):
                note = f"{WARNING}after the merge {' and '.join(lost)} is not finite: {NOT_KEPT}"
                outcome = replace(outcome, accepted=0.0, notes=(*outcome.notes, note))
                after = before
            else:  # it was not finite before, so the merge is not to blame
                self.trainer.exchange_weights(held)
        evaluated = time.thread_time()
        if changed and outcome.accepted > 0 and self._moments is not None:
            notes = self._moments.merge(outcome, moments, self.spec)
            outcome = replace(outcome, notes=(*outcome.notes, *notes))
        settled = time.thread_time()
        refused, cpu_s = {**outcome.refused, **unfit}, {"merge": (merged - ready) + (settled - evaluated)}
        if self._first.teaches([peer for peer in apart if peer.name not in unfit]):
            own = held if changed and outcome.accepted > 0 else self.trainer.weights()
            known = [peer for peer in (*parts, *apart) if peer.name not in refused]
            norms, moved = self._norms.now(), {} if self._moments is None else self._moments.norms_now()
            self._first.carry_over(self.trainer, action.round, own, known)
            self._norms.after_training(norms)
            if self._moments is not None:
                self._unsaid += self._moments.after_training(moved)
            cpu_s["train"] = time.thread_time() - settled
            after = self.evaluate() if last else after
        cpu_s["evaluate"] = (
            (evaluated - start) + (time.thread_time() - settled) - (merged - ready) - cpu_s.get("train", 0.0)
        )
        if outcome.doubtful and outcome.accepted > 0:
            self.doubt = (self.doubt[0] or action.round, action.round)
        return MergeResult(
            refused=refused,
            accepted=outcome.accepted,
            before=before,
            after=after,
            notes=(*outcome.notes, *self._first.done()),
            cpu_s=cpu_s,
            # a method that does not align gives no permutations, and "none moved" would be said of nothing
            moved={peer: share for peer, share in outcome.moved.items() if outcome.permutations[peer]},
            moved_groups={peer: moved_by_group(p) for peer, p in outcome.permutations.items() if p},
        )

    def _plan_of(self, first: bool) -> MergePlan:
        """Return how an exchange merges, the first of a round or a further one.

        Further ones average what a repair at the first has made from own data: with batch statistics of all agents a
        mean does better than with those of own data, and they hold for weights that have all but met.
        """
        plan = self._plan
        if first or not plan.combine.traits["linear"]:
            return plan
        return replace(plan, repair=repair_registry.bind("none", {}))

    def evaluate(self, weights: Weights | None = None) -> dict[str, float]:
        """Return the test metrics of the current weights, or of others."""
        return self.trainer.evaluate(self.task.data("test"), weights)

    def save(self, file: Path) -> None:
        """Write the current weights as plain safetensors."""
        write_weights(file, self.trainer.weights(copy=False), durable=self.durable)

    def trusts_again(self, number: int) -> bool:
        """Whether weights after a round can be trusted again: the last doubtful merge is long over, and they are no
        larger than usual."""
        return self._norms.are_usual() and number >= self.doubt[1] + HORIZON

    def fault_of(self, checkpoint: Checkpoint) -> str:
        """Return why an agent cannot go on from a checkpoint though it is whole, or nothing."""
        if self._plan.keep_not_finite:
            return ""
        tensors = checkpoint.trainer.tensors
        weights = {name.removeprefix("model/"): tensors[name] for name in tensors if name.startswith("model/")}
        try:
            norms_of(weights, natures_of(weights, self.trainer.model))
        except MergeError as error:
            return str(error)
        return ""

    def _judge(self, weights: Weights) -> float:
        """Score weights on the test set, by the loss where it is known, else by the task's metric; NaN where there is
        neither."""
        values = self.trainer.evaluate(self.task.data("test"), weights)
        return -values["loss"] if "loss" in values else values.get(self.task.metric, nan)

    def _open(self, snapshot: Path) -> tuple[Weights, Weights, Weights]:
        """Return a snapshot's weights and, where merges rest on statistics, those, and where moments are merged, those.
        Elsewhere they are tensors too many, which the screen refuses."""
        weights, own = open_weights(snapshot), self.trainer.model.state_dict()
        statistics: Weights = {}
        moments: Weights = {}
        if self._moments is not None:
            weights, moments = apart(weights, own, PREFIXES)
        if self._plan.statistics:
            weights, statistics = apart(weights, own)
        return weights, statistics, moments

    def _context(
        self, number: int, aux: Mapping[str, Weights] | None = None, checks: Callable[[str], None] | None = None
    ) -> MergeContext:
        order = torch_generator(self.config.seed, "align", self.name, number)
        batches = self.trainer.input_batches(self._shared_inputs(), self.config.train.eval_batch_size, order)
        return MergeContext(
            model=self.trainer.model,
            spec=self.spec,
            data=batches,
            score=self._score(),
            generator=torch_generator(self.config.seed, "merge", self.name, number),
            base=self.base,
            aux=aux,
            state=self.method,
            reference=self._norms.reference(),
            judge=self._judge,
            beside=checks,
            observer_cache=self.observers,
        )

    def _shared_inputs(self) -> Data:
        """Return the examples on which networks are compared and BatchNorm is re-estimated."""
        if self._plan.align_data == "local":
            return self._own
        if self._plan.align_data == "pooled":
            return self.task.data("train")
        return self._probe()

    def _probe(self) -> Data:
        probe = self.task.data("probe")
        return Subset(probe, torch.arange(min(self._plan.probe_samples, len(probe))))

    def _score_asked(self) -> bool:
        """Tell whether merges are judged by the task's metric."""
        judged = self._plan.combine.settings.get("objective")  # a combine method may judge by score too
        return self._plan.accept.name == "no-worse" or judged == "score"

    def _score(self) -> Callable[[Mapping[str, Tensor]], float] | None:
        if not self._score_asked():
            return None
        data = self._hold_out if self._hold_out is not None else self._probe()
        return lambda weights: self.trainer.evaluate(data, weights)[self.task.metric]
