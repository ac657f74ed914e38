"""What the round machine is told (events) and what it asks for (actions): plain frozen facts, without behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dimat import events as facts
from dimat.agent.basis import BasisId


# ── what the machine is told ─────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class Started:
    """The agent is up and begins at `round`."""

    round: int = 1


@dataclass(frozen=True, slots=True)
class TrainingDone:
    """Training of `round` is over and its weights are recorded under the address `root`."""

    round: int
    root: str


@dataclass(frozen=True, slots=True)
class PeerPublished:
    """`peer` offers the snapshot `root`, its weights of `round`, written in `basis`."""

    peer: str
    round: int
    root: str
    basis: BasisId


@dataclass(frozen=True, slots=True)
class SnapshotReady:
    """A snapshot asked for with `Fetch` is here, whole and checked."""

    peer: str
    round: int
    root: str


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """A snapshot asked for with `Fetch` cannot be had."""

    peer: str
    round: int
    root: str
    reason: str


@dataclass(frozen=True, slots=True)
class PeerLost:
    """`peer` is out of reach; do not wait for it in this round."""

    peer: str


@dataclass(frozen=True, slots=True)
class Deadline:
    """The timer that was set for `round` has run out."""

    round: int


@dataclass(frozen=True, slots=True)
class BasisChanged:
    """The agent has permuted itself (or could not, and `basis` is its old one)."""

    round: int
    basis: BasisId
    moved: float = 0.0


@dataclass(frozen=True, slots=True)
class MergeDone:
    """The merge of `round` is in place. `refused`: peers that the screen kept out, and why."""

    round: int
    refused: Mapping[str, str]
    accepted: float = 1.0
    before: Mapping[str, float] | None = None
    after: Mapping[str, float] | None = None
    merge_s: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave as soon as possible."""

    reason: str = "stopped"


Event = (
    Started
    | TrainingDone
    | PeerPublished
    | SnapshotReady
    | FetchFailed
    | PeerLost
    | Deadline
    | BasisChanged
    | MergeDone
    | Stop
)


# ── what the machine asks for ────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class Train:
    """Train for a round (not if `learn` is false), then record the weights; answer `TrainingDone`."""

    round: int
    learn: bool


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Make the agent's state durable. `stage`: "trained" or "merged"."""

    round: int
    stage: str


@dataclass(frozen=True, slots=True)
class Publish:
    """Offer the recorded snapshot `root` to the peers."""

    round: int
    root: str
    basis: BasisId
    parents: tuple[facts.Contribution, ...]


@dataclass(frozen=True, slots=True)
class Fetch:
    """Get a peer's snapshot; answer `SnapshotReady` or `FetchFailed`."""

    peer: str
    round: int
    root: str


@dataclass(frozen=True, slots=True)
class AdoptBasis:
    """Permute own weights, buffers and optimizer state into the basis of a peer's snapshot; answer `BasisChanged`."""

    round: int
    peer: str
    root: str
    basis: BasisId


@dataclass(frozen=True, slots=True)
class Part:
    """A peer's share in a merge. `same_basis`: its units are in the order of ours, no alignment is needed."""

    peer: str
    root: str
    weight: float
    same_basis: bool


@dataclass(frozen=True, slots=True)
class Merge:
    """Merge own weights (with `own_weight`) and the parts; answer `MergeDone`. Weights sum to 1."""

    round: int
    own_weight: float
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Answer `Deadline(round)` after `seconds`."""

    round: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """Tell the listeners a fact (the driver adds run and time)."""

    fact: facts.Event


@dataclass(frozen=True, slots=True)
class Exit:
    """The agent is through."""

    reason: str


Action = Train | Checkpoint | Publish | Fetch | AdoptBasis | Merge | SetTimer | Report | Exit
