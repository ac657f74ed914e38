"""What the round machine is told (events) and what it asks for (actions): plain frozen facts, without behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dimat import events
from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.offers import PeerPublished
from dimat.agent.protocol.plan import Plan
from dimat.agent.protocol.state import MachineState, Stage
from dimat.events import Contribution


# ── what the machine is told ─────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class Started:
    """The agent is up. It goes on from its checkpoint if the machine was given one, else it begins at round 1; with
    `join` it first listens for a network that lives already."""

    join: bool = False


@dataclass(frozen=True, slots=True)
class TrainingDone:
    """Training of `round` is over and its weights are recorded under the address `root`."""

    round: int
    root: str


@dataclass(frozen=True, slots=True)
class SnapshotReady:
    """A snapshot asked for with `Fetch` is here, whole and checked."""

    peer: str
    round: int
    root: str


@dataclass(frozen=True, slots=True)
class FetchFailure:
    """A snapshot asked for with `Fetch` cannot be had."""

    peer: str
    round: int
    root: str
    reason: str


@dataclass(frozen=True, slots=True)
class PeerLost:
    """`peer` has left or is out of reach: nobody waits for it until it is heard again.

    `last`: the last round that it published, where it said so when it left; up to that one it is waited for.
    """

    peer: str
    reason: str = "out of reach"
    last: int = 0


@dataclass(frozen=True, slots=True)
class Deadline:
    """The timer that was set for `round` has run out (round 0: the wait for a network to join)."""

    round: int


@dataclass(frozen=True, slots=True)
class Moves:
    """What a change of basis moved: the share of all units whose place changed, and that of each symmetry group."""

    share: float = 0.0
    groups: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class BasisChanged:
    """The agent has permuted itself (or could not, and `basis` is its old one). `moved`: share of its units whose place
    changed; `groups`: the same of each symmetry group."""

    round: int
    basis: BasisId
    moved: float = 0.0
    groups: Mapping[str, float] = field(default_factory=dict[str, float])

    @staticmethod
    def after(action: AdoptBasis, own: BasisId, moves: Moves | None) -> BasisChanged:
        """Return what became of an action; `own`: the basis before, which stays where there are no moves."""
        if moves is None:
            return BasisChanged(action.round, own)
        return BasisChanged(action.round, action.basis, moves.share, moves.groups)


@dataclass(frozen=True, slots=True)
class WeightsAdopted:
    """The agent has taken over the weights of the snapshot `root` whole; not if it could not and says why (`fault`)."""

    root: str
    fault: str = ""


@dataclass(frozen=True, slots=True)
class MergeDone:
    """The merge of `round` is in place. `refused`: peers that the screen kept out, and why; `moved`: of each peer that
    was aligned, the share of its units whose place changed, and `moved_groups` that of each symmetry group."""

    round: int
    refused: Mapping[str, str]
    accepted: float = 1.0
    before: Mapping[str, float] | None = None
    after: Mapping[str, float] | None = None
    merge_s: float = 0.0
    notes: tuple[str, ...] = ()
    moved: Mapping[str, float] = field(default_factory=dict[str, float])
    moved_groups: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])


@dataclass(frozen=True, slots=True)
class MapChanged:
    """The operator has changed the network map; the new plan holds from the next round on."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class TimeUp:
    """The time that the run was given is over: finish the round, then leave."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave at once; the newest checkpoint stands."""

    reason: str = "stopped"


Event = (
    Started
    | TrainingDone
    | PeerPublished
    | SnapshotReady
    | FetchFailure
    | PeerLost
    | Deadline
    | BasisChanged
    | WeightsAdopted
    | MergeDone
    | MapChanged
    | TimeUp
    | Stop
)


# ── what is kept of a merge ───
@dataclass(frozen=True, slots=True)
class MergeRecord:
    """One merge of one agent. `snapshot`: its own snapshot of the round, by address; `contributions`: whose
    snapshots with what weight, self first, summing to 1; `refused`: peers kept out, with the reason; `trained`: whether
    own snapshot came out of training; `kind`: "merge", or "join" where a newcomer took a peer's weights over whole;
    `accepted`: share of the way from own to merged weights, 0 where the merge was turned down; `before`, `after`: test
    metrics where they were evaluated; `manifests`: by peer the blake3 of the manifest that it signed for its part;
    `moved`: by peer that was aligned the share of its units whose place changed, and `moved_groups` that of each
    symmetry group."""

    agent: str
    round: int
    snapshot: str
    contributions: tuple[Contribution, ...]
    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    accepted: float = 1.0
    trained: bool = True
    kind: str = "merge"
    before: Mapping[str, float] = field(default_factory=dict[str, float])
    after: Mapping[str, float] = field(default_factory=dict[str, float])
    manifests: Mapping[str, str] = field(default_factory=dict[str, str])
    moved: Mapping[str, float] = field(default_factory=dict[str, float])
    moved_groups: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "contributions": [asdict(part) for part in self.contributions]}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> MergeRecord:
        """Return what `to_dict` gave; KeyError or TypeError where it is something else."""
        plain: dict[str, Any] = dict(values)
        plain["contributions"] = tuple(Contribution(**part) for part in values["contributions"])
        return MergeRecord(**plain)


# ── what the machine asks for ────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class Train:
    """Train for a round (not if `learn` is false), then record the weights; answer `TrainingDone`."""

    round: int
    learn: bool


@dataclass(frozen=True, slots=True)
class CheckpointAction:
    """Make the agent's state durable: weights, optimizer, random streams, and `state`, from which a machine goes on.

    `record`: what the weights were merged from, where they were; it is made durable no later than the state.
    """

    round: int
    stage: Stage
    state: MachineState
    record: MergeRecord | None = None


@dataclass(frozen=True, slots=True)
class Publish:
    """Offer the recorded snapshot `root` to the peers, from the `CheckpointAction` before on, never earlier.

    `pushed`: by reader, all the push-sum weight ever sent to it.
    """

    round: int
    root: str
    basis: BasisId
    parents: tuple[events.Contribution, ...]
    pushed: Mapping[str, float] = field(default_factory=dict[str, float])
    base: str = ""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Get a peer's snapshot; answer `SnapshotReady`, or `FetchFailure` where it cannot be had for good (withdrawn,
    damaged). While the peer is only out of reach a driver goes on trying, until `Release`."""

    peer: str
    round: int
    root: str


@dataclass(frozen=True, slots=True)
class Release:
    """A snapshot that was asked for with `Fetch` is needed no more, here or on its way. Another round's of the same
    peer with equal content is not meant."""

    peer: str
    round: int
    root: str


@dataclass(frozen=True, slots=True)
class AdoptWeights:
    """Take over a peer's weights whole, with a fresh optimizer, and its `base` if it has one; answer
    `WeightsAdopted`."""

    peer: str
    round: int
    root: str
    base: str


@dataclass(frozen=True, slots=True)
class AdoptBasis:
    """Permute own weights, buffers and optimizer state into the basis of a peer's snapshot; answer `BasisChanged`."""

    round: int
    peer: str
    root: str
    basis: BasisId


@dataclass(frozen=True, slots=True)
class Part:
    """A peer's share in a merge: its snapshot `root` of `round`. `same_basis`: its units are in the order of ours, no
    alignment is needed."""

    peer: str
    round: int
    root: str
    weight: float
    same_basis: bool


@dataclass(frozen=True, slots=True)
class MergeAction:
    """Merge own weights (with `own_weight`) and the parts; answer `MergeDone`. Weights sum to 1."""

    round: int
    own_weight: float
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Answer `Deadline(round)` after `seconds`; a timer that was set before is called off."""

    round: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """Tell the listeners a fact (the driver adds run and time)."""

    fact: events.Event


@dataclass(frozen=True, slots=True)
class Exit:
    """The agent is through."""

    reason: str


Action = (
    Train
    | CheckpointAction
    | Publish
    | Fetch
    | Release
    | AdoptWeights
    | AdoptBasis
    | MergeAction
    | SetTimer
    | Report
    | Exit
)
