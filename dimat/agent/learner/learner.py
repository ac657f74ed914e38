"""The learner: one agent's model, optimizer and data, and the work of a round on them.

It trains, records snapshots, adopts a basis and merges; of its peers it knows only the files of their snapshots. Every
driver (simulator, daemon) has one learner per agent.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field, replace
from math import nan
from pathlib import Path
from time import thread_time
from typing import Any

from torch import Tensor

from dimat.agent.learner.checkpoint import Checkpoint
from dimat.agent.learner.example_sets import ExampleSets
from dimat.agent.learner.first_merge import FirstMerge, PeerSplit
from dimat.agent.learner.merge_metrics import MergeMetrics
from dimat.agent.learner.own_data import compare_data, describe_data
from dimat.agent.learner.own_norms import OwnNorms
from dimat.agent.learner.peer_snapshots import Opened, open_snapshot
from dimat.agent.learner.recorder import Recorder
from dimat.agent.learner.shared_base import load_base, plan_for
from dimat.agent.learner.shared_logits import SharedLogits
from dimat.agent.learner.shared_moments import SharedMoments
from dimat.agent.learner.statistics import OwnStatistics
from dimat.agent.protocol.messages import MergeAction, Moves
from dimat.agent.protocol.state import MachineState
from dimat.config import ExperimentConfig
from dimat.errors import DimatError, PeerError
from dimat.events import MergeResult, TrainResult
from dimat.merge import MergeContext, MergeOutcome, MergePlan, Peer, adopt, merge
from dimat.merge.growth import HORIZON
from dimat.merge.matching.assignment import moved_by_group, moved_share
from dimat.merge.registry import combine_registry, repair_registry
from dimat.merge.shared_statistics import OWN, beside
from dimat.merge.stages import StageTimer, Weights
from dimat.metrics import score_of
from dimat.seeds import torch_generator
from dimat.symmetry import Observer, SymmetrySpec
from dimat.tasks.base import Task
from dimat.train.base import ModelTrainer, Training
from dimat.train.losses import class_counts
from dimat.train.trainer import Trainer
from dimat.weights.snapshot import RecordedSnapshot
from dimat.weights.tensors import schema_hash, write_weights


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
    plan: InitVar[MergePlan | None] = None
    """The plan of its merges, where it is known: it is the configuration's for the task."""
    custom_trainer: InitVar[ModelTrainer | None] = None
    """Trains the model, where it is not to be a `Trainer` made of task and configuration."""
    trainer: ModelTrainer = field(init=False)
    base: dict[str, Tensor] | None = field(init=False)
    """Weights that task vectors are taken from, where the configuration names any."""
    _plan: MergePlan = field(init=False)
    _norms: OwnNorms = field(init=False)
    doubt: tuple[int, int] = field(init=False, default=(0, 0))
    """Rounds of the first and the last doubtful merge that weights rest on; 0 for none."""
    _statistics: OwnStatistics = field(init=False)
    _moments: SharedMoments = field(init=False)
    _first: FirstMerge = field(init=False)
    _logits: SharedLogits | None = field(init=False, default=None)
    """What it exchanges in place of weights, where the method says so."""
    _sets: ExampleSets = field(init=False)
    _recorder: Recorder = field(init=False)
    _samples: int = field(init=False, default=0)
    """Examples of the last training."""
    _learned: bool = field(init=False, default=False)
    """Whether the weights are those of a training, and not of a merge."""
    _unsaid: tuple[str, ...] = field(init=False, default=())
    """Notes for people that go with the next training."""

    def __post_init__(self, plan: MergePlan | None, custom_trainer: ModelTrainer | None) -> None:
        config = self.config
        self._recorder = Recorder(self.store, config.exchange, durable=self.durable)
        self._plan = plan or plan_for(config.merge, self.task)
        self.base = load_base(config, self.task)
        self._sets = ExampleSets.of(self.task, self._plan, self.name, self.indices, config.seed)
        self._statistics = OwnStatistics(self.task, self._sets.own, config.train.eval_batch_size)
        self.trainer = custom_trainer or self._new_trainer()
        self._norms = OwnNorms(self.trainer, used=not self._plan.keep_not_finite)
        merged = config.optimizer_state == "merged"
        self._moments = SharedMoments(self.trainer, config.exchange.moments, self._plan, used=merged)
        self._first = FirstMerge(config.schedule)
        self._first.check(self.trainer)
        if self._plan.shares == "logits":
            self._logits = SharedLogits(self._plan, self._sets, self.trainer, self._own_training)

    def _new_trainer(self) -> Trainer:
        config, train = self.config, self.task.data("train")
        # the skew of a part is measured against the whole; and who stands for all agents has the whole
        known = len(self.indices) < len(train) or config.merge.preset.ceiling
        trainer = Trainer(
            self.task,
            self._sets.own,
            config.train,
            seed=config.seed,
            path=("agent", self.name),
            rounds_total=max(config.schedule.rounds, 1),
            folder=Path(config.folder),
            reference=class_counts(self.task, train) if known else None,
        )
        self._unsaid = (trainer.loss.note,) if trainer.loss.note else ()
        return trainer

    def train(self, number: int, learn: bool = True, kept: Training | None = None) -> TrainResult:
        """Train for a round (not if `learn` is false), and compute the merge method's statistics. `kept`: brings the
        trainer to the end of this training, where an equal one was made before."""
        report = None
        with self._own_training():
            timer = StageTimer(thread_time)
            if learn:
                report = kept(self.trainer) if kept else self.trainer.train(self.config.schedule.round_of(number))
            timer.lap("train")
        draws = torch_generator(self.config.seed, "statistics", self.name, number)
        plan = self._plan_of(self.config.schedule.begins_round(number))
        self._statistics.take(plan, self.trainer.model, draws)
        if self._statistics.tensors:
            timer.lap("statistics")
        self._learned, self._samples = report is not None, report.samples if report is not None else 0
        loss = report.loss if report is not None else nan
        said, self._unsaid = self._unsaid, ()
        return TrainResult(loss=loss, samples=self._samples, notes=said, cpu_s=timer.seconds)

    @contextmanager
    def _own_training(self) -> Generator[None]:
        """Let the norms by which merges are bounded follow what is trained meanwhile."""
        norms, moments = self._norms.now() if self._norms.norms else {}, self._moments.norms_now()
        yield
        self._norms.after_training(norms)
        self._unsaid += self._moments.after_training(moments)

    def record(self) -> RecordedSnapshot:
        """Record the current weights as a snapshot, in the encoding in which peers get them; or the logits in their
        place.

        Raises DataError if it cannot be written; it may then be tried again.
        """
        if self._logits is not None:
            tensors = self._logits.tensors()
            return RecordedSnapshot(*self._recorder.record(tensors), self._logits.schema, self._samples)
        weights = self.trainer.weights(copy=False)
        extras = {**self._statistics.tensors, **(self._moments.encoded() if self._learned else {})}
        payload, forms = self._recorder.record(beside(weights, extras))
        return RecordedSnapshot(payload, forms, schema_hash(weights), self._samples)

    def adopt_weights(self, peer: str, snapshot: Path) -> str:
        """Adopt all weights of a peer.

        Returns an empty string, or with nothing changed the reason why it could not.
        """
        weights, statistics, moments = self._open(snapshot)
        if fault := self._unfit(peer, weights):
            return fault
        try:
            self._moments.check(peer, moments)
        except DimatError as error:
            return str(error)
        self.trainer.start_from({name: weights[name] for name in self.trainer.weights(copy=False)})
        if note := self._moments.adopt(moments):
            self._unsaid += (note,)
        self.method = {}  # what a merge method carries from merge to merge was of the weights before
        self._statistics.adopt(statistics)
        self._norms.begin()
        self._recorder.forget()
        return ""

    def _unfit(self, peer: str, weights: Weights) -> str:
        return self._norms.unfit(peer, weights, self._plan.screen)

    def checkpoint(self, machine: MachineState) -> Checkpoint:
        """Return all that this agent needs to continue, with the round machine's state. Its tensors are the model's and
        the optimizer's own: write it before they change."""
        tensors = {name: value for name, value in self.method.items() if isinstance(value, Tensor)}
        values = {name: value for name, value in self.method.items() if name not in tensors}
        return Checkpoint(
            machine,
            self.trainer.state(copy=False),
            self.schema(),
            tensors,
            values,
            self._statistics.tensors,
            self.data_now(),
            self._norms.norms,
            self.doubt,
            self._moments.norms,
        )

    def restore(self, checkpoint: Checkpoint) -> str:
        """Continue from a checkpoint; return why a new epoch begins with it, "" if the epoch continues.

        Raises DataError if it does not fit the task, its data or the training's settings.
        """
        note = ""
        if isinstance(self.trainer, Trainer):
            note = compare_data(checkpoint.data, self.data_now(), accepted=self.config.agent.accept_new_data)
            self.trainer.load_state(checkpoint.trainer, new_epoch=bool(note))
        else:
            self.trainer.load_state(checkpoint.trainer)
        self.method = {**checkpoint.method_tensors, **checkpoint.method_values}
        self._statistics.tensors = dict(checkpoint.statistics)
        self._norms.norms = dict(checkpoint.norms)
        self.doubt = checkpoint.doubt
        self._moments.restore(checkpoint.moment_norms)
        machine = checkpoint.machine
        self._learned = machine.stage == "trained" and self.config.schedule.learns(machine.round)
        return note

    def data_now(self) -> dict[str, int | float | str]:
        """Return a checkpoint's description of the data; nothing if the user's own loop reads them."""
        own = isinstance(self.trainer, Trainer)
        return describe_data(self._sets.own, self.trainer.batches, self.part) if own else {}

    def schema(self) -> str:
        """Return the hash of the model's tensor names, shapes and types."""
        return schema_hash(self.trainer.model.state_dict())

    def adopt_basis(self, number: int, peer: str, snapshot: Path) -> Moves | None:
        """Permute weights, buffers and optimizer into the basis of a peer's snapshot, or adopt its weights with it.

        Return which units moved. None, with nothing changed, if the snapshot is not fit to align to. Without symmetry
        groups nothing is permuted: all bases are then the same.
        """
        if self._first.adopts(number):
            former = self.trainer.weights()
            if self.adopt_weights(peer, snapshot):
                return None  # the merge refuses this peer too, and says why
            self._first.took_over(former, peer)
            return Moves()
        if self.spec is None:
            return Moves()
        source = Peer(peer, self._open(snapshot).weights, weight=0.0)
        try:
            permutations = adopt(self.trainer.weights(copy=False), source, self._plan, self._context(number))
        except PeerError:
            return None  # the merge's own screen refuses this peer, and says why
        note = self.trainer.permute(self.spec, permutations)
        self._recorder.forget()  # in another order of units the change since the last snapshot is no small one
        self._statistics.permute(self.spec, permutations)
        return Moves(moved_share(permutations), moved_by_group(permutations), note)

    def merge(self, action: MergeAction, sources: Mapping[str, Path], evaluate: str) -> MergeResult:
        """Merge the agent's own weights with its peers' snapshots.

        `sources`: the snapshots' files, by peer; `evaluate`: "all" (test metrics before and after), "after" or "none";
        of several mixing steps before the first and after the last.
        """
        schedule = self.config.schedule
        first, last = schedule.begins_round(action.round), schedule.ends_round(action.round)
        metrics = MergeMetrics(self.evaluate, evaluate, first=first, last=last)
        timer = StageTimer(thread_time)
        metrics.take_before(self._first.former)
        timer.lap("evaluate")
        if self._logits is not None:
            order = torch_generator(self.config.seed, "distil", self.name, action.round)
            return self._logits.merge(action, schedule.round_of(action.round), sources, metrics, timer, order)
        opened = {part.peer: self._open(sources[part.peer]) for part in action.parts}
        peers = [Peer(part.peer, opened[part.peer].weights, part.weight, part.same_basis) for part in action.parts]
        split = self._first.split(action.round, peers, self._unfit)
        outcome = self._merge_weights(action, split, opened, self._plan_of(first))
        held = outcome.weights
        if outcome.changes:
            self.trainer.exchange_weights(held)  # from here on own weights of before are held
        timer.lap("merge")
        metrics.take_after(changed=outcome.changes or self._first.former is not None)
        if not self._plan.keep_not_finite:
            outcome = metrics.keep_if_finite(outcome, held, self.trainer, self._sets.own)
        timer.lap("evaluate")
        if outcome.changes:
            notes = self._moments.merge(outcome, {peer: each.moments for peer, each in opened.items()}, self.spec)
            outcome = replace(outcome, notes=(*outcome.notes, *notes))
        timer.lap("merge")
        refused = split.refused(outcome.refused)
        if self._first.teaches(split):
            own = held if outcome.changes else self.trainer.weights()
            with self._own_training():
                self._first.teach(self.trainer, action.round, own, split, refused)
            timer.lap("train")
            metrics.take_after(changed=True)
        timer.lap("evaluate")
        if outcome.doubtful and outcome.accepted > 0:
            self.doubt = (self.doubt[0] or action.round, action.round)
        return MergeResult(
            refused=refused,
            accepted=outcome.accepted,
            before=metrics.before,
            after=metrics.after,
            notes=(*outcome.notes, *self._first.done()),
            cpu_s=timer.seconds,
            # a method that does not align gives no permutations, and "none moved" would be said of nothing
            moved={peer: share for peer, share in outcome.moved.items() if outcome.permutations[peer]},
            moved_groups={peer: moved_by_group(p) for peer, p in outcome.permutations.items() if p},
        )

    def _merge_weights(
        self, action: MergeAction, split: PeerSplit, opened: Mapping[str, Opened], plan: MergePlan
    ) -> MergeOutcome:
        """Merge own weights with those of peers; the model still has its own."""
        statistics = {OWN: self._statistics.tensors, **{peer: each.statistics for peer, each in opened.items()}}
        checks = self._moments.checks({peer: each.moments for peer, each in opened.items()})
        context = self._context(action.round, statistics if plan.statistics else None, checks)
        own_weight = action.own_weight + split.left_out_weight
        outcome = merge(self.trainer.weights(copy=False), own_weight, split.merged, plan, context)
        self.method = context.state or {}
        self._statistics.forget()
        return outcome

    def _plan_of(self, first: bool) -> MergePlan:
        """Return how an exchange merges, the first of a round or a further one.

        Further ones average what the first has made from own data: with batch statistics of all agents a mean does
        better than with those of own data, and they hold for weights that have all but met; and layers that RegMean
        has fitted meet sooner, without statistics of theirs.
        """
        plan, then = self._plan, self._plan.combine.traits["then"]
        if first or not (then or plan.combine.traits["linear"]):
            return plan
        combine = combine_registry.bind(then, {}) if then else plan.combine
        return replace(plan, combine=combine, repair=repair_registry.bind("none", {}))

    def evaluate(self, weights: Weights | None = None) -> dict[str, float]:
        """Return the test metrics of the current weights, or of others."""
        return self.trainer.evaluate(self.task.data("test"), weights)

    def save(self, file: Path) -> None:
        """Write the current weights as plain safetensors."""
        write_weights(file, self.trainer.weights(copy=False), durable=self.durable)

    def trusts_again(self, number: int) -> bool:
        """Whether weights after a round can be trusted again: the last doubtful merge is long ago, and they are no
        larger than usual."""
        return self._norms.are_usual() and number >= self.doubt[1] + HORIZON

    def fault_of(self, checkpoint: Checkpoint) -> str:
        """Return why an agent cannot continue from a checkpoint although it is whole, or nothing."""
        tensors = checkpoint.trainer.tensors
        return self._norms.not_finite(
            {name.removeprefix("model/"): tensors[name] for name in tensors if name.startswith("model/")}
        )

    def _judge(self, weights: Weights) -> float:
        """Score weights on the test set, by the loss where it is known, else by the task's metric, or NaN."""
        values = self.trainer.evaluate(self.task.data("test"), weights)
        metric = "loss" if "loss" in values else self.task.metric
        return score_of(metric, values.get(metric, nan))

    def _open(self, snapshot: Path) -> Opened:
        own, statistics = self.trainer.model.state_dict(), bool(self._plan.statistics)
        return open_snapshot(snapshot, own, statistics=statistics, moments=self._moments.used)

    def _context(
        self, number: int, aux: Mapping[str, Weights] | None = None, checks: Callable[[str], None] | None = None
    ) -> MergeContext:
        order = torch_generator(self.config.seed, "align", self.name, number)
        batches = self.trainer.input_batches(self._sets.compared(), self.config.train.eval_batch_size, order)
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

    def _score(self) -> Callable[[Mapping[str, Tensor]], float] | None:
        """Return what judges weights by the task's metric, None where nothing asks for it."""
        data, metric = self._sets.judged(), self.task.metric
        return None if data is None else lambda w: score_of(metric, self.trainer.evaluate(data, w)[metric])
