"""Folds one agent's events into its current state, which all displays show.

The runner and the simulator make `RoundFinished` with it, and the reader of old logs completes that event with it.
Status, panel, metrics, console and dashboard show its fields.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from dimat import events

WARNINGS_KEPT = 5


@dataclass(slots=True)
class AgentView:
    """State of one agent. `members` and `peers`: all agents on its map, and those whose snapshots it merges;
    `phase_began`: by the caller's clock; `spent`: seconds by phase, without the current one; `trained`, `merged`,
    `finished`, `network`: the newest event of the kind. `late`, `refused`: the reason by peer, and `waited_s`: seconds
    of waiting, in the round in progress or the one that has just ended. `checkpoints`: the newest of each stage;
    `warnings`: the newest ones; `crashed`: in a simulation, until its next event; `back_s`: seconds until it comes
    back."""

    agent: str = ""
    run: str = ""
    metric: str = "accuracy"
    started: events.AgentStarted | None = None
    members: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    round: int = 0
    phase: str = ""
    phase_began: float = 0.0
    spent: dict[str, float] = field(default_factory=dict[str, float])
    trained: events.Trained | None = None
    merged: events.Merged | None = None
    finished: events.RoundFinished | None = None
    network: events.NetworkObserved | None = None
    keys: events.KeysRead | None = None
    basis: str = ""
    late: dict[str, str] = field(default_factory=dict[str, str])
    refused: dict[str, str] = field(default_factory=dict[str, str])
    waited_s: float | None = None
    checkpoints: dict[str, events.Checkpointed] = field(default_factory=dict[str, events.Checkpointed])
    warnings: deque[str] = field(default_factory=lambda: deque[str](maxlen=WARNINGS_KEPT))
    crashed: bool = False
    back_s: float | None = None
    left: str = ""

    def take(self, event: events.Event, now: float = 0.0) -> None:
        """Fold in an event of this agent. `now`: seconds of the caller's clock."""
        if isinstance(event, events.AgentEvent):
            self.round = event.round
        match event:
            case events.RoundStarted():
                self.late, self.refused, self.waited_s = {}, {}, None
                self.crashed, self.left = False, ""
            case events.PhaseStarted(phase=phase, previous=previous, previous_s=seconds):
                if previous:  # never less than was told while it went on
                    self.spent[previous] = max(self.spent.get(previous, 0.0) + seconds, self.seconds(previous, now))
                if previous == "wait":
                    self.waited_s = seconds
                self.phase, self.phase_began = phase, now
            case events.Trained():
                self.trained = event
            case events.Published(basis=basis) | events.BasisAdopted(basis=basis):
                self.basis = basis
            case events.Merged():
                self.merged = event
            case events.RoundFinished():
                self.finished = event
            case events.Checkpointed(stage=stage):
                self.checkpoints[stage] = event
            case events.NetworkObserved():
                self.network = event
            case events.PeerLate(peer=peer, reason=reason):
                self.late[peer] = reason
            case events.PeerRefused(peer=peer, reason=reason):
                self.refused[peer] = reason
                self.warnings.append(f"{peer} refused: {reason}")
            case events.Warned(message=message):
                self.warnings.append(message)
            case _:
                self._live(event)

    def _live(self, event: events.Event) -> None:
        """Fold in that the agent starts, ends or has another map."""
        match event:
            case events.AgentStarted():
                self.agent, self.run, self.metric, self.started = event.agent, event.run, event.metric, event
                self.members, self.peers = event.members, event.peers
                self.crashed, self.left = False, ""
            case events.Joined() | events.Resumed():
                self.crashed, self.left, self.late, self.refused, self.waited_s = False, "", {}, {}, None
            case events.KeysRead():
                self.keys = event
            case events.MapRead():
                self.members, self.peers = event.members, event.peers
            case events.AgentCrashed(back_s=back_s):
                self.crashed, self.back_s = True, back_s
            case events.AgentLeft(reason=reason):
                self.left = reason
            case _:
                pass

    @property
    def loss(self) -> float | None:
        """Mean loss of the newest local training."""
        return None if self.trained is None else self.trained.result.loss

    @property
    def before(self) -> Mapping[str, float]:
        """Test metrics before the newest merge."""
        return {} if self.merged is None else self.merged.result.before

    @property
    def after(self) -> Mapping[str, float]:
        """Test metrics after the newest merge."""
        return {} if self.merged is None else self.merged.result.after

    @property
    def checkpoint(self) -> events.Checkpointed | None:
        """The newest checkpoint."""
        return max(self.checkpoints.values(), key=lambda event: event.time_s, default=None)

    def seconds(self, phase: str, now: float) -> float:
        """Return the seconds spent in a phase, the current one included. `now`: by the same clock as for `take`."""
        running = now - self.phase_began if phase == self.phase and not self.left else 0.0
        return self.spent.get(phase, 0.0) + max(0.0, running)

    def round_finished(self, number: int, bytes_sent: int, bytes_received: int) -> events.RoundFinished:
        """Return the event that sums up a round which ends now. Bytes are of payload, since the round before."""
        trained = self.trained if self.trained is not None and self.trained.round == number else None
        merged = self.merged if self.merged is not None and self.merged.round == number else None
        result = events.MergeResult() if merged is None else merged.result
        seconds = {
            "train": None if trained is None else trained.train_s,
            "wait": self.waited_s,
            "merge": None if merged is None else result.merge_s,
        }
        return events.RoundFinished(
            agent=self.agent,
            round=number,
            heard=0 if merged is None else merged.heard,
            expected=0 if merged is None else merged.expected,
            bytes_sent=bytes_sent,
            bytes_received=bytes_received,
            loss=None if trained is None else trained.result.loss,
            samples=0 if trained is None else trained.result.samples,
            basis=self.basis,
            contributions=() if merged is None else merged.contributions,
            before=result.before,
            after=result.after,
            accepted=result.accepted,
            late=self.late,
            refused=self.refused,
            seconds={phase: spent for phase, spent in seconds.items() if spent is not None},
            push_weight=None if merged is None else merged.push_weight,
            notes=result.notes,
        )
