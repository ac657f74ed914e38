"""A real agent's work in its own thread, so that the event loop continues to serve peers."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from dimat.agent.daemon.mid_round import MidRound
from dimat.agent.learner.checkpoint_store import TRUSTED, CheckpointStore
from dimat.agent.learner.learner import Learner
from dimat.agent.lineage.compaction import Compaction
from dimat.agent.lineage.lineage import append_record
from dimat.agent.protocol import messages as m
from dimat.agent.protocol.state import Restored
from dimat.agent.protocol.work import Outcome, Work
from dimat.events import MergeResult, TrainResult
from dimat.train.progress import TrainingInterruptedError
from dimat.weights.snapshot import RecordedSnapshot

T = TypeVar("T")


class WorkThread:
    """A thread that does its jobs in order.

    It is a daemon thread: the process does not wait for it at its end.
    """

    def __init__(self) -> None:
        self.busy = False
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._loop, name="dimat-work", daemon=True).start()

    def do(self, job: Callable[[], T]) -> asyncio.Future[T]:
        """Do a job once those before it are done.

        Returns a future of its outcome, in the caller's event loop.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(outcome: T | None, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(outcome)  # pyright: ignore[reportArgumentType]

        def run() -> None:
            try:
                outcome, error = job(), None
            except BaseException as caught:  # the caller is told, whatever it was
                outcome, error = None, caught
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, outcome, error)

        self._jobs.put(run)
        return future

    def _loop(self) -> None:
        while True:
            job = self._jobs.get()
            self.busy = True
            job()
            self.busy = False


class AgentWorker(Work[Path]):
    """The work of a real agent, done in the agent's one thread when its outcomes are taken.

    `evaluate`: on what occasions a merge is evaluated (`Learner.merge`); `lineage`: file of the records of merges;
    `weights`: file in which people find the newest merged weights; `middle`: saves training in the middle of a round;
    `compaction`: of the ledgers.
    """

    def __init__(
        self,
        learner: Learner,
        run: str,
        checkpoints: CheckpointStore,
        lineage: Path,
        evaluate: str,
        weights: Path,
        middle: MidRound,
        compaction: Compaction,
    ) -> None:
        self.middle = middle
        self._compaction = compaction
        self._learner = learner
        self._run = run
        self._checkpoints = checkpoints
        self._lineage = lineage
        self._evaluate = evaluate
        self._weights = weights
        self._complete: Callable[[], None] | None = None

    def restore(self) -> Outcome[Restored | None]:
        """Continue from the newest readable checkpoint."""

        def restored() -> Restored | None:
            learner = self._learner
            found = self._checkpoints.newest(self._run, learner.name, learner.schema(), learner.fault_of)
            if found is None:
                return None
            note = self._learner.restore(found.checkpoint)
            if not note:  # else a new epoch begins, and with it the round
                self.middle.restore(found.checkpoint, self._run)
            return Restored(found.checkpoint.machine, found.published, found.passed_over, note)

        return restored

    def train(self, action: m.Train) -> Outcome[TrainResult]:
        """Train for a round, or for the rest of a round that was interrupted before a restart."""

        def trained() -> TrainResult:
            self.middle.begin()
            try:
                return self._learner.train(action.round, action.learn)
            except TrainingInterruptedError:
                raise
            except BaseException:
                self.middle.failed()
                raise

        return trained

    def record(self, action: m.Train) -> Outcome[RecordedSnapshot]:
        """Record the weights as a snapshot, with the facts for its manifest."""
        return self._record

    def recorded(self, root: str) -> Outcome[RecordedSnapshot | None]:
        """Return a snapshot that was recorded before a restart, by address.

        None if it is gone.
        """
        return lambda: RecordedSnapshot.load(self._learner.store, root)

    def checkpoint(self, action: m.CheckpointAction) -> Outcome[None]:
        """Make the record of a merge and the agent's state durable; after training, all but what `complete` writes."""

        def written() -> None:
            if action.record is not None:
                append_record(self._lineage, action.record)
            if action.stage == "merged":
                self._keep_trusted(action.round)
            checkpoint = self._learner.checkpoint(action.state)
            if action.stage == "trained":
                self._complete = self._checkpoints.begin(checkpoint)
            else:
                self._checkpoints.save(checkpoint)
            self.middle.checkpointed(action.state)

        return written

    def complete(self) -> Outcome[None]:
        """Write the rest of the checkpoint after training, when peers can have its snapshot already."""

        def completed() -> None:
            if self._complete is not None:
                self._complete()
                self._complete = None

        return completed

    @property
    def incomplete(self) -> bool:
        """Whether the newest checkpoint still has a part for `complete` to write."""
        return self._complete is not None

    def _keep_trusted(self, number: int) -> None:
        """Set the checkpoint from before the first doubtful merge aside until weights can be trusted again."""
        learner = self._learner
        first, _ = learner.doubt
        if first == number:
            self._checkpoints.set_aside(TRUSTED)
        elif first and learner.trusts_again(number):
            learner.doubt = (0, 0)
            self._checkpoints.drop(TRUSTED)

    def adopt_basis(self, action: m.AdoptBasis, source: Path) -> Outcome[m.Moves | None]:
        """Permute the agent into the basis of a snapshot."""
        return lambda: self._learner.adopt_basis(action.round, action.peer, source)

    def adopt_weights(self, action: m.AdoptWeights, source: Path) -> Outcome[str]:
        """Adopt the weights of a snapshot."""
        return lambda: self._learner.adopt_weights(action.peer, source)

    def merge(self, action: m.MergeAction, sources: Mapping[str, Path]) -> Outcome[MergeResult]:
        """Merge snapshots into the agent's own weights."""
        return lambda: self._learner.merge(action, sources, self._evaluate)

    def compact(self) -> Outcome[bool]:
        """Compact the ledgers if one is about to exceed its bound."""
        return self._compaction.look

    def save_weights(self) -> Outcome[None]:
        """Write the weights of the checkpoint that was just made to the file for people."""

        def saved() -> None:
            if not self._checkpoints.share_weights(self._weights):
                self._learner.save(self._weights)

        return saved

    def _record(self) -> RecordedSnapshot:
        snapshot = self._learner.record()
        store = self._learner.store
        snapshot.save(store)
        for file in store.glob("*.json"):
            if not file.with_suffix(".safetensors").exists():
                file.unlink(missing_ok=True)
        return snapshot
