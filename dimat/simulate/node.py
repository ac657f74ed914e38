"""An agent in the simulated world: its round machine, its work and its state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dimat.agent.protocol import messages as m
from dimat.agent.protocol.plan import Plan
from dimat.agent.protocol.round import RoundMachine
from dimat.agent.protocol.state import MachineState
from dimat.agent.protocol.work import Work
from dimat.simulate.world.faults import Crash, CrashPoint
from dimat.weights.snapshot import RecordedSnapshot


class StepListener(Protocol):
    """A listener to every new round machine and to every step of it."""

    def begin(self, time_s: float, agent: str, state: MachineState | None, published: int) -> None: ...
    def step(self, time_s: float, agent: str, event: m.Event, actions: Sequence[m.Action]) -> None: ...


class SimulatedWork(Work[Any], Protocol):
    """One agent's work in the simulated world; it begins with the call."""

    def crash(self) -> None:
        """Forget everything of the agent that is not on disk."""
        ...

    def train_s(self, action: m.Train, now: float) -> float:
        """Return how long training that begins now takes, in virtual seconds."""
        ...

    def merge_s(self, action: m.MergeAction, now: float) -> float:
        """Return how long a merge that begins now takes, in virtual seconds."""
        ...


@dataclass(slots=True)
class Node:
    """An agent's machine in the simulated world, and the work that it asks for.

    `state`: "absent", "up", "down", "through" (it serves on) or "gone" (for good); `life` counts its starts and ends:
    what was meant for an earlier life is dropped. `timer`: its newest one's number in the queue, 0 where it has run
    out. `recorded`: by address the snapshots that it may still be asked to publish, oldest first; the network holds
    them. `unsure`: waits for the checkpoint that was asked for and whose outcome is not known yet. `outage`: the crash
    that it is to come back from. `leaves`: it goes for good once its machine ends. `round`: of its last machine.
    """

    plan: Plan
    make: Callable[[MachineState | None, int], RoundMachine]
    work: SimulatedWork
    machine: RoundMachine | None = None
    state: str = "absent"
    life: int = 0
    timer: int = 0
    recorded: dict[str, RecordedSnapshot] = field(default_factory=dict[str, RecordedSnapshot])
    unsure: Callable[[], object] | None = None
    outage: Crash | CrashPoint | None = None
    leaves: bool = False
    round: int = 0

    @property
    def serves(self) -> bool:
        """Whether what it offers can be had now."""
        return self.state in ("up", "through")

    def settle(self) -> None:
        """Wait until what was asked for is durable; its error, if it could not be made so."""
        if self.unsure is not None:
            wait, self.unsure = self.unsure, None
            wait()
