"""Typed events of a run: the source of all displays, logs, metrics and drawings.

The round machine, the simulator and the daemon emit events; listeners in `dimat.ui` receive them.
An event states what happened; it carries no formatting and no live object. `to_dict` gives its JSONL form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from math import nan
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events. `run`: name of the run; `time_s`: virtual (simulator) or wall-clock seconds."""

    run: str = ""
    time_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the event as a plain dictionary, its class name under `event` first."""
        return {"event": type(self).__name__, **asdict(self)}


Listener = Callable[[Event], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(Event):
    """A run begins. `edges`: edges of the first round's graph, as pairs of agent names, directed if the graph is;
    `histogram`: number of samples of each class, by agent; `parameters`: elements of one model. Estimates are for the
    whole run on this host: memory of all processes, size of the run folder, and traffic sent by all agents."""

    method: str
    seed: int
    agents: tuple[str, ...]
    edges: tuple[tuple[str, str], ...]
    rounds: int
    parameters: int
    snapshot_bytes: int
    histogram: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    metric: str = "accuracy"
    estimated_memory_mb: float = 0.0
    estimated_disk_mb: float = 0.0
    estimated_mb_sent: float = 0.0
    workers: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentEvent(Event):
    """Base of events about one agent's round (`round` counts from 1)."""

    agent: str
    round: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentStarted(AgentEvent):
    """A real agent is up and continues after `round` (0: it is new). `address`: where it listens; `peers`: agents whose
    snapshots it merges; `samples`: size of its training data; `secure`: whether its connections are encrypted and
    authenticated; `members`: all agents on the map; `rounds`: of the run, 0 for no end; `metric`: of the task;
    `version`: of dimat; `histogram`: number of its samples of each class, empty if the task has no classes."""

    address: str
    peers: tuple[str, ...]
    samples: int
    parameters: int
    secure: bool
    members: tuple[str, ...] = ()
    rounds: int = 0
    metric: str = "accuracy"
    version: str = ""
    histogram: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MapRead(AgentEvent):
    """A real agent has adopted another network map. `members`: all agents on it; `peers`: agents whose snapshots it
    merges from now on."""

    members: tuple[str, ...]
    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysRead(AgentEvent):
    """A real agent uses these keys from now on. `fingerprint`: SHA-256 of its certificate, in hex; `until_s`: Unix time
    when this certificate, or its CA's, expires."""

    fingerprint: str
    until_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseStarted(AgentEvent):
    """A real agent begins the next phase of its round. `phase`: "join" (a newcomer listens for a network), "train"
    (training, until its result is durable), "wait" (its snapshot is published, and it waits for peers), "merge" (basis,
    merge, evaluation, and the checkpoint after it) or "done". `previous`: the phase before, which took `previous_s`
    seconds; "" for none."""

    phase: str
    previous: str = ""
    previous_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStarted(AgentEvent):
    """An agent begins a round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How the training of one round went. `loss`: mean training loss, NaN where the round had no training; `samples`:
    examples seen, repeats counted; `notes`: remarks for people; `cpu_s`: CPU-seconds by activity ("train", and
    "statistics" where the merge method needs some)."""

    loss: float = nan
    samples: int = 0
    notes: tuple[str, ...] = ()
    cpu_s: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained(AgentEvent):
    """Local training of a round is over. `train_s`: its wall-clock seconds (CPU-seconds in the simulator)."""

    result: TrainResult
    train_s: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, those of the result among the event's own."""
        plain = Event.to_dict(self)
        del plain["result"]
        result = {name: getattr(self.result, name) for name in ("loss", "samples", "notes")}
        return {**plain, **result, "train_s": self.train_s}


@dataclass(frozen=True, slots=True, kw_only=True)
class Published(AgentEvent):
    """A snapshot is recorded and offered to the peers."""

    snapshot: str
    bytes: int
    basis: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotFetched(AgentEvent):
    """A peer's snapshot has arrived, whole and checked. `bytes`: traffic received for it, failed attempts included."""

    peer: str
    snapshot: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchFailed(AgentEvent):
    """A peer's snapshot could not be fetched and is given up (a late one is `PeerLate`). `reason`: why."""

    peer: str
    snapshot: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLate(AgentEvent):
    """A peer's snapshot did not arrive in time; its mixing weight goes to the agent itself. `reason`: "deadline", or
    why it failed."""

    peer: str
    reason: str = "deadline"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRefused(AgentEvent):
    """A peer's snapshot was not merged; `reason` names the tensor and the fault."""

    peer: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BasisAdopted(AgentEvent):
    """The agent permuted its units into a peer's basis. `moved`: share of all units whose place changed; `groups`: the
    same share for each symmetry group."""

    peer: str
    basis: str
    moved: float
    groups: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """One part of a merge: whose snapshot of which round entered with what weight. `verdict`: "own", "same basis"
    (its units were in this agent's order), "other basis" (aligned if the method aligns), or "adopted" (taken whole)."""

    agent: str
    snapshot: str
    round: int
    weight: float
    verdict: str = ""


WARNING = "warning: "
"""A merge's note that begins so is shown as a warning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeResult:
    """How one merge went. `refused`: peers that the screen refused, with the reason; `accepted`: share of the way from
    the agent's own to the merged weights, 0 if the merge was rejected; `before`, `after`: test metrics, if evaluated;
    `notes`: remarks for people, of which warnings begin with WARNING; `moved`: for each aligned peer, the share of its
    units whose place changed, and `moved_groups` that of each symmetry group; `cpu_s`: CPU-seconds by activity
    ("merge", "evaluate", "checkpoint")."""

    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    accepted: float = 1.0
    before: Mapping[str, float] = field(default_factory=dict[str, float])
    after: Mapping[str, float] = field(default_factory=dict[str, float])
    notes: tuple[str, ...] = ()
    moved: Mapping[str, float] = field(default_factory=dict[str, float])
    moved_groups: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    cpu_s: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def merge_s(self) -> float:
        """CPU-seconds of the merge itself, without evaluation."""
        return self.cpu_s.get("merge", 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged(AgentEvent):
    """A merge is done. `contributions` list the agent itself first; their weights sum to 1; the snapshots of `heard`
    of the `expected` peers came in time, refused ones included. `push_weight`: the agent's push-sum weight after the
    merge, None without push-sum."""

    contributions: tuple[Contribution, ...]
    heard: int = 0
    expected: int = 0
    result: MergeResult = field(default_factory=MergeResult)
    push_weight: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, those of the result that a log holds among the event's own."""
        plain = Event.to_dict(self)
        del plain["result"]
        return {**plain, **{name: getattr(self.result, name) for name in MERGE_LOGGED}}


MERGE_LOGGED = ("before", "after", "accepted", "merge_s", "notes")
"""The part of a merge's result that its event writes; the rest stands in the record of the merge (lineage.jsonl)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsSkipped(AgentEvent):
    """An agent skips the rounds from `first` on and continues with `round`: the network is ahead, or other content of
    these rounds may have been published before a checkpoint was lost."""

    first: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined(AgentEvent):
    """A newcomer takes part from `round` on. `how`: "adopt" (it has adopted the weights of `peer`), "align" (it keeps
    its own), or "found" (it heard nobody and begins a network)."""

    how: str
    peer: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(AgentEvent):
    """An agent continues from its checkpoint of `round`. `stage`: "trained", "merged" or "joined"; a second event with
    "training" says that it continues in the middle of that round's training."""

    stage: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentCrashed(AgentEvent):
    """An agent has crashed (simulator only). `back_s`: seconds until it comes back, None for never."""

    back_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentLeft(AgentEvent):
    """An agent has left. `reason`: "done", "target", "time", or why it was stopped."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinksCut(Event):
    """The network splits into groups that do not hear each other (simulator only)."""

    groups: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinksHealed(Event):
    """A partition is over (simulator only)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpointed(AgentEvent):
    """A checkpoint was written. `stage`: "trained" (before publishing), "merged" or "joined"; "training": a round's
    training so far, kept beside the previous checkpoint. A daemon's checkpoint survives power loss; the simulator
    writes checkpoints only if agents may crash, and does not wait for the disk."""

    stage: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundFinished(AgentEvent):
    """An agent's round is over. The event sums up the round; `AgentView.round_finished` makes it.

    The snapshots of `heard` of the `expected` peers came in time; `loss`: mean training loss, None where the round had
    no training; `contributions` list the agent itself first, and are empty where the round had no merge; `late` and
    `refused`: the reason, by peer; `seconds`: duration of each phase ("train", "wait", "merge") where known. The other
    fields are as in `Trained`, `Published` and `Merged`."""

    heard: int
    expected: int
    bytes_sent: int
    bytes_received: int
    loss: float | None = None
    samples: int = 0
    basis: str = ""
    contributions: tuple[Contribution, ...] = ()
    before: Mapping[str, float] = field(default_factory=dict[str, float])
    after: Mapping[str, float] = field(default_factory=dict[str, float])
    accepted: float = 1.0
    late: Mapping[str, str] = field(default_factory=dict[str, str])
    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    push_weight: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkObserved(AgentEvent):
    """State of a real agent's network, when a connection or the DHT changes, after a round, and every few seconds.

    `connected`: peers that the agent is connected to; `heard_at_s`: Unix time of each peer's last byte; `sent`,
    `received`: bytes of payload by peer and encoding, `retries`: repeated attempts to fetch, by peer, and
    `dht_restarts`, all since this process started. `dht_up`: None without a DHT. `own_disk_bytes`,
    `received_disk_bytes`: disk space of own and of peers' snapshots."""

    connected: tuple[str, ...] = ()
    heard_at_s: Mapping[str, float] = field(default_factory=dict[str, float])
    sent: Mapping[str, Mapping[str, int]] = field(default_factory=dict[str, Mapping[str, int]])
    received: Mapping[str, Mapping[str, int]] = field(default_factory=dict[str, Mapping[str, int]])
    retries: Mapping[str, int] = field(default_factory=dict[str, int])
    dht_up: bool | None = None
    dht_restarts: int = 0
    own_disk_bytes: int = 0
    received_disk_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSummary(Event):
    """All agents ended a round (simulator only): what the console prints per round. Metrics are over the agents;
    `mb_sent`: megabytes sent by all agents since the start."""

    round: int
    rounds: int
    loss: float | None
    before_mean: float | None
    after_mean: float | None
    after_min: float | None
    after_max: float | None
    consensus_distance: float
    bases: int
    heard: int
    expected: int
    mb_sent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned(Event):
    """A warning: a person should know about this, but the run continues."""

    message: str
    agent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished(Event):
    """A run ended. `reason`: "done" or "stopped"."""

    reason: str
    rounds_done: int
    wall_s: float
