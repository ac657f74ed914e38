"""One simulated agent: what is in its memory, which a crash takes, and what is on its disk, which stays."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import NamedTuple

from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.messages import MergeAction, MergeRecord
from dimat.agent.protocol.offers import PeerPublished
from dimat.agent.protocol.plan import Plan, RoundPlan
from dimat.agent.protocol.round import RoundMachine
from dimat.agent.protocol.state import MachineState
from dimat.events import Contribution
from tests.faults.model import Model, Snapshot
from tests.faults.schedule import Fault
from tests.faults.waiting import Waiting

RUN = "run"
MESSAGE, OWN, TIMER, FAULT = range(4)
"""What comes up in the queue: from a peer, from the process itself, a timer, something going wrong."""

KEPT = 3
"""Checkpoints on a disk."""


class Saved(NamedTuple):
    """A checkpoint. `text`: all that a restart reads; the rest is kept aside to compare with. `merged`: what the
    network was merged from before its training, if it has been."""

    text: str
    state: MachineState
    model: Model
    merged: tuple[Contribution, ...]


@dataclass(slots=True, eq=False)
class Held:
    """A snapshot that was asked for and not released. `snapshot`: None until it is here, whole."""

    round: int
    snapshot: Snapshot | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """What a publisher's store says about one of its snapshots."""

    round: int
    root: str
    basis: BasisId
    pushed: dict[str, float]
    base: str
    previous: int


@dataclass(eq=False)
class Node:
    """An agent. The machine sees nothing of this; the driver and the checks do."""

    name: str
    index: int
    plan: Plan
    basis: BasisId
    initial: Model
    rng: random.Random
    late: bool = False
    # process
    machine: RoundMachine | None = None
    life: int = 0
    up: bool = False
    exited: str = ""
    exited_at: float = 0.0
    gone: bool = False  # never comes back
    paused_until: float = -1.0
    time_up: bool = False
    actions: int = 0
    crashes: dict[int, Fault] = field(default_factory=dict)
    # memory
    model: Model = field(init=False)
    held: dict[tuple[str, str], list[Held]] = field(default_factory=dict)
    timers: dict[int, tuple[float, int]] = field(default_factory=dict)
    merging: tuple[MergeAction, dict[str, str], float] | None = None
    adopting: int = 0  # the round of the snapshot whose basis is being taken over
    taken: tuple[str, int, str] | None = None  # peer, round and address of weights that stand for own ones in a merge
    # disk
    disk: list[Saved] = field(default_factory=list)
    store: dict[int, Offer] = field(default_factory=dict)
    intact: bool = True  # whether a checkpoint was written since one was damaged: one in a row is
    published: int = 0
    records: list[MergeRecord] = field(default_factory=list)
    # what the checks remember of this life
    known: frozenset[str] = frozenset()  # peers by the plan that the machine goes by
    row: RoundPlan | None = None
    row_round: int = 0
    expired: int = -1
    timed: set[int] = field(default_factory=set)
    asked: dict[tuple[str, int], str] = field(default_factory=dict)
    proofs: dict[str, int] = field(default_factory=dict)
    waiting: Waiting = field(default_factory=Waiting)
    closed: dict[str, Held] | None = None
    unfit: bool = False
    bases: dict[str, BasisId] = field(default_factory=dict)  # the smallest of each peer, in this life
    time_heard: bool = False
    calm_merges: int = 0  # since faults ceased; which of them was the last without a planned peer
    missed: dict[str, int] = field(default_factory=dict)
    # what they remember over all lives
    offered: dict[tuple[str, int, str], PeerPublished] = field(default_factory=dict)
    merged: tuple[Contribution, ...] = ()

    def __post_init__(self) -> None:
        self.model = self.initial.copy()

    def save(self, state: MachineState) -> None:
        """Write a checkpoint."""
        text = json.dumps({"state": state.to_dict(), "model": self.model.to_dict()})
        self.disk.append(Saved(text, state, self.model.copy(), self.merged))
        del self.disk[:-KEPT]

    def load(self) -> tuple[MachineState | None, Model]:
        """Read the newest checkpoint, if there is one."""
        if not self.disk:
            return None, self.initial.copy()
        values = json.loads(self.disk[-1].text)
        return MachineState.from_dict(values["state"]), Model.from_dict(values["model"])

    def here(self, peer: str, root: str, number: int = 0) -> Snapshot | None:
        """Return a snapshot that is held whole (`number`: of that round)."""
        for held in self.held.get((peer, root), ()):
            if held.snapshot is not None and number in (0, held.round):
                return held.snapshot
        return None

    def drop(self, peer: str, number: int, root: str, held: Held | None = None) -> bool:
        """Let go of a snapshot of round `number` (of one fetch, `held`), here or on its way."""
        entries = self.held.get((peer, root), [])
        found = [entry for entry in entries if entry.round == number and held in (None, entry)]
        if not found:
            return False
        entries.remove(found[0])
        if not entries:
            del self.held[peer, root]
        return True

    @property
    def heard(self) -> BasisId | None:
        """The smallest basis that it has heard of in this life from members of its map."""
        return min(self.bases.values(), default=None)

    def forget(self) -> None:
        """Lose the memory."""
        self.machine = None
        self.held, self.timers, self.timed, self.asked, self.proofs = {}, {}, set(), {}, {}
        self.merging, self.closed, self.waiting = None, None, Waiting()
        self.row, self.row_round, self.expired, self.unfit, self.taken = None, 0, -1, False, None
        self.bases, self.time_heard = {}, False
