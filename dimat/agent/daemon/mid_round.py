"""Saves an agent's training in the middle of a round, to continue it after a restart."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from dimat.agent.learner.checkpoint import Checkpoint
from dimat.agent.learner.checkpoint_store import CheckpointStore
from dimat.agent.learner.learner import Learner
from dimat.agent.protocol.state import MachineState
from dimat.errors import DataError
from dimat.train.progress import Interrupts
from dimat.train.trainer import Trainer

ASIDE = "training"
"""The name under which it is set aside."""


class MidRound:
    """Saves the training of one agent where it is: when the agent is told to stop, and every `every_s` seconds.

    `told` is called after each of the timed saves, in the thread that trains, with the reason why it failed or "". A
    trainer that is not dimat's own (a user's loop) cannot be interrupted; its rounds start from their beginning. Only
    `interrupt` may be called outside the thread that does the agent's work.
    """

    def __init__(
        self, learner: Learner, checkpoints: CheckpointStore, every_s: float | None, told: Callable[[str], None]
    ) -> None:
        self.resumed = False
        """Whether the next training goes on in the middle of a round."""
        self.fault = ""
        """Why it could not go on in the middle of a round that was saved."""
        self.unsaved = False
        """Whether anything was trained since the newest checkpoint; any thread may look."""
        self._learner = learner
        self._checkpoints = checkpoints
        self._every_s = every_s
        self._told = told
        self._stop = threading.Event()
        self._machine: MachineState | None = None  # of the newest checkpoint
        self._kept = False
        self._saved_s = 0.0
        trainer = learner.trainer
        self._able = isinstance(trainer, Trainer)
        if isinstance(trainer, Trainer):
            trainer.interrupts = Interrupts(self._due, self._pause)

    def interrupt(self) -> None:
        """Interrupt training after the current step; for any thread."""
        self._stop.set()

    def restore(self, newest: Checkpoint, run: str) -> None:
        """Continue in the middle of the round after the newest checkpoint (which was restored), if that was saved."""
        self._machine = newest.machine
        learner = self._learner
        try:
            aside = self._checkpoints.aside(ASIDE, run, learner.name, learner.schema())
            self._kept = aside is not None
            if not self._able or aside is None or aside.machine != newest.machine:
                return
            learner.trainer.load_state(aside.trainer)
        except DataError as error:
            learner.restore(newest)
            self.fault = f"{error}; the round starts from its beginning"
        else:
            self.resumed = True

    def begin(self) -> None:
        """Note that training begins."""
        self.resumed = False
        self.unsaved, self._saved_s = self._able, time.monotonic()

    def failed(self) -> None:
        """Note that training has failed: nothing may continue from its state."""
        self.unsaved = False

    def checkpointed(self, machine: MachineState) -> None:
        """Note that a checkpoint was made, which is newer than any state from the middle of a round."""
        self._machine, self.unsaved = machine, False
        if self._kept:
            self._checkpoints.drop(ASIDE)
            self._kept = False

    def leave(self) -> bool:
        """Save the training since the newest checkpoint; return whether there was any. Raises DataError if it cannot
        be written."""
        if not self.unsaved:
            return False
        self._save()
        return True

    def _due(self) -> bool:
        every_s = self._every_s
        return self._stop.is_set() or (every_s is not None and time.monotonic() - self._saved_s >= every_s)

    def _pause(self) -> bool:
        if self._stop.is_set():
            return True  # `leave` comes next, and saves
        try:
            self._save()
        except DataError as error:
            self._told(str(error))
        else:
            self._told("")
        self._saved_s = time.monotonic()
        return False

    def _save(self) -> None:
        if self._machine is not None:  # an agent has a checkpoint before it trains
            self._checkpoints.set_aside(ASIDE, self._learner.checkpoint(self._machine))
            self._kept = True
