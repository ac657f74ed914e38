"""The work of an agent on its own machine: one protocol for daemon and simulator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from dimat.agent.protocol import messages as m
from dimat.agent.protocol.state import Restored
from dimat.events import MergeResult, TrainResult
from dimat.weights.snapshot import RecordedSnapshot

T = TypeVar("T")
Source = TypeVar("Source", contravariant=True)

Outcome = Callable[[], T]
"""Gives the outcome of a piece of work, and may take as long as the work does; raises what went wrong in it."""


class Work(Protocol[Source]):
    """The work that one agent does when its round machine asks.

    `Source`: a driver's handle of a peer's snapshot (a file's path).

    A call asks for a piece of work, and its outcome is taken once: in the order of the calls, as each piece of work
    builds on the one before. The work may begin with the call (on the simulator's workers) or when its outcome is taken
    (in the daemon's thread). If taking an outcome raised DataError it may be taken again.
    """

    def restore(self) -> Outcome[Restored | None]:
        """Continue from the newest readable checkpoint.

        None if there is no checkpoint: the agent is new.
        """
        ...

    def train(self, action: m.Train) -> Outcome[TrainResult]:
        """Train for a round (unless the action says not to); compute the method's statistics."""
        ...

    def record(self, action: m.Train) -> Outcome[RecordedSnapshot]:
        """Record the weights after a round's training; raises DataError if they cannot be written."""
        ...

    def checkpoint(self, action: m.CheckpointAction) -> Outcome[None]:
        """Make the record of a merge and the agent's state durable; raises DataError if that fails."""
        ...

    def adopt_basis(self, action: m.AdoptBasis, source: Source) -> Outcome[m.Moves | None]:
        """Bring the agent into the basis of a snapshot: permute its units, or adopt the snapshot's weights.

        None, with nothing changed, if the snapshot is not fit for that.
        """
        ...

    def adopt_weights(self, action: m.AdoptWeights, source: Source) -> Outcome[str]:
        """Adopt the weights of a snapshot.

        The outcome is the reason why they could not be adopted, or an empty string.
        """
        ...

    def merge(self, action: m.MergeAction, sources: Mapping[str, Source]) -> Outcome[MergeResult]:
        """Merge snapshots, given by peer, into the agent's own weights."""
        ...
