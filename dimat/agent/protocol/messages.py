"""The round machine's messages: the events it is told, and the actions it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import nan
from typing import Any

from dimat import events
from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.offers import PeerPublished
from dimat.agent.protocol.plan import Plan
from dimat.agent.protocol.state import MachineState, Stage
from dimat.events import Contribution, MergeResult
from dimat.reading import as_type
from dimat.weights.snapshot import Manifest, RecordedSnapshot


# ── what the machine is told ─────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class Started:
    """The agent is up.

    It continues from its checkpoint if the machine was given one, else it begins at round 1; with `join` it first
    listens for an existing network.
    """

    join: bool = False


@dataclass(frozen=True, slots=True)
class TrainingDone:
    """Training of `round` is over and its weights are recorded under the address `root`."""

    round: int
    root: str


@dataclass(frozen=True, slots=True)
class SnapshotReady:
    """A snapshot asked for with `Fetch` has arrived, whole and checked."""

    peer: str
    round: int
    root: str


@dataclass(frozen=True, slots=True)
class FetchFailure:
    """A snapshot asked for with `Fetch` could not be fetched."""

    peer: str
    round: int
    root: str
    reason: str


@dataclass(frozen=True, slots=True)
class PeerLost:
    """`peer` has left or is out of reach: nobody waits for it until it is heard again.

    `last`: the last round that it published, if it said so when it left; rounds up to that one are waited for.
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
    """The share of all units that a change of basis moved, and that of each symmetry group.

    `note`: a remark for people, "" for none.
    """

    share: float = 0.0
    groups: Mapping[str, float] = field(default_factory=dict[str, float])
    note: str = ""


@dataclass(frozen=True, slots=True)
class BasisChanged:
    """The agent has permuted itself (or could not, and `basis` is its old one).

    `moved`: share of its units whose place changed; `groups`: the same for each symmetry group; `note`: a remark for
    people.
    """

    round: int
    basis: BasisId
    moved: float = 0.0
    groups: Mapping[str, float] = field(default_factory=dict[str, float])
    note: str = ""

    @staticmethod
    def after(action: AdoptBasis, own: BasisId, moves: Moves | None) -> BasisChanged:
        """Return the result of an action.

        `own`: the basis before, which stays if there are no moves.
        """
        if moves is None:
            return BasisChanged(action.round, own)
        return BasisChanged(action.round, action.basis, moves.share, moves.groups, moves.note)


@dataclass(frozen=True, slots=True)
class WeightsAdopted:
    """The agent has adopted all weights of the snapshot `root`.

    If it could not, `fault` says why.
    """

    root: str
    fault: str = ""


@dataclass(frozen=True, slots=True)
class MergeDone:
    """The merge of `round` is in place."""

    round: int
    result: MergeResult = field(default_factory=MergeResult)


@dataclass(frozen=True, slots=True)
class MapChanged:
    """The operator has changed the network map; the new plan applies from the next round on."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class TimeUp:
    """The run's time limit has passed: finish the round, then leave."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave at once; the newest checkpoint stays valid."""

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
    """One merge of one agent.

    `snapshot`: its own snapshot of the round, by address; `contributions`: whose snapshots with what weight, its own
    first, summing to 1; `trained`: whether training produced the agent's own snapshot; `kind`: "merge", or "join"
    if a newcomer adopted a peer's weights; `manifests`: for each peer the blake3 of the manifest that it signed
    for its part.
    """

    agent: str
    round: int
    snapshot: str
    contributions: tuple[Contribution, ...]
    result: MergeResult = field(default_factory=MergeResult)
    trained: bool = True
    kind: str = "merge"
    manifests: Mapping[str, str] = field(default_factory=dict[str, str])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, those of the result that a record keeps among its own."""
        plain = asdict(self)
        result = plain.pop("result")
        return {**plain, **{name: result[name] for name in MERGE_RECORDED}}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> MergeRecord:
        """Rebuild a record from `to_dict`; raises ValueError for other values."""
        if unknown := values.keys() - MergeRecord.__dataclass_fields__.keys() - {*MERGE_RECORDED}:
            raise ValueError(f"unknown key {min(unknown)!r}")
        result = {name: values[name] for name in MERGE_RECORDED if name in values}
        for stage in ("before", "after"):
            result[stage] = metrics_of(as_type(dict[str, float | None], result.get(stage) or {}))
        return as_type(MergeRecord, {**values, "result": result})


def metrics_of(plain: Mapping[str, float | None] | None) -> dict[str, float]:
    """Return metrics from JSON, which has null for a number that is not finite."""
    return {name: nan if value is None else value for name, value in (plain or {}).items()}


MERGE_RECORDED = ("refused", "accepted", "before", "after", "moved", "moved_groups")
"""The part of a merge's result that is kept for good."""


# ── what the machine asks for ────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class Train:
    """Train for a round (not if `learn` is false), then record the weights.

    Answer `TrainingDone`.
    """

    round: int
    learn: bool


@dataclass(frozen=True, slots=True)
class CheckpointAction:
    """Make the agent's state durable: weights, optimizer, random streams, machine.

    `state`: the machine's, from which another can continue; `record`: of the merge or join that gave the weights, if
    any; it is made durable no later than the state.
    """

    round: int
    stage: Stage
    state: MachineState
    record: MergeRecord | None = None


@dataclass(frozen=True, slots=True)
class Publish:
    """Offer the recorded snapshot `root` to the peers, once the action before is durable.

    `pushed`: by reader, all the push-sum weight ever sent to it.
    """

    round: int
    root: str
    basis: BasisId
    parents: tuple[Contribution, ...]
    pushed: Mapping[str, float] = field(default_factory=dict[str, float])
    base: str = ""

    def manifest(self, run: str, agent: str, snapshot: RecordedSnapshot) -> Manifest:
        """Return the snapshot's manifest, for the peers."""
        return Manifest.of(
            snapshot,
            run=run,
            agent=agent,
            round=self.round,
            basis=str(self.basis),
            base=self.base,
            parents=self.parents,
            pushed=self.pushed,
        )


@dataclass(frozen=True, slots=True)
class Fetch:
    """Get a peer's snapshot.

    Answer `SnapshotReady`, or `FetchFailure` if it can never be fetched (withdrawn, damaged). While the peer is
    only out of reach, a driver tries again until `Release`.
    """

    peer: str
    round: int
    root: str


@dataclass(frozen=True, slots=True)
class Release:
    """A snapshot that was asked for with `Fetch` is no longer needed, whether arrived or in transit.

    This does not concern another round of the same peer with equal content.
    """

    peer: str
    round: int
    root: str


@dataclass(frozen=True, slots=True)
class AdoptWeights:
    """Adopt all weights of a peer, with a fresh optimizer, and its `base` if it has one.

    Answer `WeightsAdopted`.
    """

    peer: str
    round: int
    root: str
    base: str


@dataclass(frozen=True, slots=True)
class AdoptBasis:
    """Permute the agent's weights, buffers and optimizer state into the basis of a peer's snapshot, or in the first
    rounds adopt its weights too, if `schedule.first_merge` says so.

    Answer `BasisChanged`.
    """

    round: int
    peer: str
    root: str
    basis: BasisId


@dataclass(frozen=True, slots=True)
class MergePart:
    """A peer's share in a merge: its snapshot `root` of `round`.

    `same_basis`: its units are in this agent's order, no alignment is needed.
    """

    peer: str
    round: int
    root: str
    weight: float
    same_basis: bool


@dataclass(frozen=True, slots=True)
class MergeAction:
    """Merge the agent's own weights (with `own_weight`) and the parts; answer `MergeDone`.

    Weights sum to 1.
    """

    round: int
    own_weight: float
    parts: tuple[MergePart, ...]


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Answer `Deadline(round)` after `seconds`; a timer that was set before is cancelled."""

    round: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Emit:
    """Pass an event to the listeners (the driver adds run and time)."""

    fact: events.Event


@dataclass(frozen=True, slots=True)
class Exit:
    """The agent has finished."""

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
    | Emit
    | Exit
)
