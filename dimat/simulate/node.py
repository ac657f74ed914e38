"""An agent in the simulated world, and what a driver needs to be given: its work, and whoever follows the steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dimat.agent.protocol import messages as m
from dimat.agent.protocol.plan import Plan
from dimat.agent.protocol.round import RoundMachine
from dimat.agent.protocol.state import MachineState
from dimat.simulate.world.faults import Crash, CrashPoint
from dimat.weights.snapshot import Payload


class Trace(Protocol):
    """Is told of every machine that is made, and of every step of it."""

    def begin(self, time_s: float, agent: str, state: MachineState | None, published: int) -> None: ...
    def step(self, time_s: float, agent: str, event: m.Event, actions: Sequence[m.Action]) -> None: ...


class Recorded(Protocol):
    """What training gives back: the snapshot that it recorded, and what to tell of it."""

    @property
    def payload(self) -> Payload: ...
    @property
    def schema(self) -> str: ...
    @property
    def loss(self) -> float: ...
    @property
    def samples(self) -> int: ...
    @property
    def train_s(self) -> float: ...


class Work(Protocol):
    """What agents do on their own machines. Each call begins it at once; the function that it returns waits for the
    outcome. `source` is what the network's store gave for a snapshot. Work of one agent is done in order."""

    def restore(self, agent: str) -> Callable[[], tuple[MachineState, int] | None]:
        """Set an agent up from its newest checkpoint: the machine's state and the last round that may be published.
        None where there is no checkpoint, and then the agent is new."""
        ...

    def crash(self, agent: str) -> None:
        """Forget all of an agent that is not on disk."""
        ...

    def train_s(self, agent: str, action: m.Train, now: float) -> float:
        """Return how long training that begins now takes, in virtual seconds."""
        ...

    def merge_s(self, agent: str, action: m.MergeAction) -> float:
        """Return how long a merge takes, in virtual seconds."""
        ...

    def train(self, agent: str, action: m.Train) -> Callable[[], Recorded]:
        """Train, and record the weights: once the outcome is here their snapshot is in the network's store."""
        ...

    def checkpoint(self, agent: str, action: m.CheckpointAction) -> Callable[[], object]: ...
    def adopt_basis(self, agent: str, action: m.AdoptBasis, source: Any) -> Callable[[], m.Moves | None]: ...
    def adopt_weights(self, agent: str, action: m.AdoptWeights, source: Any) -> Callable[[], str]: ...
    def merge(self, agent: str, action: m.MergeAction, sources: Mapping[str, Any]) -> Callable[[], m.MergeDone]: ...


@dataclass(slots=True)
class Node:
    """An agent's machine in the simulated world.

    `state`: "absent", "up", "down", "through" (it serves on) or "gone" (for good); `life` counts its starts and ends:
    what was meant for an earlier life is dropped. `timer`: its newest one's number in the queue, 0 where it has run
    out. `recorded`: by address the snapshots that it may still be asked to publish, oldest first; the network holds
    them. `unsure`: waits for the checkpoint that was asked for and whose outcome is not known yet. `outage`: the crash
    that it is to come back from. `leaves`: it goes for good once its machine ends. `round`: of its last machine.
    """

    plan: Plan
    make: Callable[[MachineState | None, int], RoundMachine]
    machine: RoundMachine | None = None
    state: str = "absent"
    life: int = 0
    timer: int = 0
    recorded: dict[str, Recorded] = field(default_factory=dict[str, Recorded])
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
