"""Typed events of a run, from which everything is shown, logged, counted and drawn.

The round machine, the simulator and (later) the daemon emit events; listeners in `dimat.ui` receive them.
An event states what happened; it carries no formatting and no live object. `to_dict` is the JSONL form.
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
    """A run begins. `edges`: undirected or directed pairs of agent names of the first round's graph;
    `histogram`: samples per class that each agent holds; `parameters`: elements of one model. Estimates are for the
    whole run on this host: memory of all processes, run folder, and what all agents send."""

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
    """A real agent is up and goes on after `round` (0: it is new). `address`: where it listens; `peers`: whom it
    listens to; `samples`: that it trains on; `secure`: whether its connections are encrypted and proven; `members`: all
    agents on the map; `rounds`: of the run, 0 for no end; `metric`: of the task; `version`: of dimat; `histogram`: its
    samples by class, empty where the task does not tell classes."""

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
    """A real agent has taken another network map over. `members`: all agents on it; `peers`: whom it listens to."""

    members: tuple[str, ...]
    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysRead(AgentEvent):
    """A real agent goes by these keys from now on. `fingerprint`: SHA-256 of its certificate, in hex; `until_s`: when
    that, or its CA's, ends, in Unix time."""

    fingerprint: str
    until_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseStarted(AgentEvent):
    """A real agent goes on to the next part of its round. `phase`: "join" (a newcomer listens for a network), "train"
    (training, and what it has learned is made durable), "wait" (published, and peers are waited for), "merge" (basis,
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
    examples seen, repeats counted; `notes`: for people; `cpu_s`: CPU-seconds by activity ("train", and "statistics"
    where the merge method asks for some)."""

    loss: float = nan
    samples: int = 0
    notes: tuple[str, ...] = ()
    cpu_s: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained(AgentEvent):
    """Local training of a round is over. `train_s`: wall-clock seconds of it (CPU-seconds in the simulator)."""

    result: TrainResult
    train_s: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; the result's stand among the event's own."""
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
    """A peer's snapshot is here, whole and checked. `bytes`: what crossed the network for it."""

    peer: str
    snapshot: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchFailed(AgentEvent):
    """A peer's snapshot cannot be had for good (one that is only late is `PeerLate`). `reason`: why."""

    peer: str
    snapshot: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLate(AgentEvent):
    """A peer's snapshot did not arrive in time; its weight goes to self. `reason`: "deadline", or why it failed."""

    peer: str
    reason: str = "deadline"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRefused(AgentEvent):
    """A peer's snapshot was not merged; `reason` names the tensor and the fault."""

    peer: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BasisAdopted(AgentEvent):
    """The agent permuted itself into a peer's basis. `moved`: share of units whose place changed; `groups`: the same of
    each symmetry group."""

    peer: str
    basis: str
    moved: float
    groups: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """One part of a merge: whose snapshot of which round entered with what weight. `verdict`: "own", "same basis"
    (units were in our order), "other basis" (aligned where the method aligns), or "adopted" (taken over whole)."""

    agent: str
    snapshot: str
    round: int
    weight: float
    verdict: str = ""


WARNING = "warning: "
"""Beginning of a note of a merge that is shown as a warning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeResult:
    """How one merge went. `refused`: peers that the screen kept out, with the reason; `accepted`: share of the way from
    the agent's own to the merged weights, 0 where the merge was turned down; `before`, `after`: test metrics where they
    were evaluated; `notes`: for people, warnings among them begin with WARNING; `moved`: by peer that was aligned the
    share of its units whose place changed, and `moved_groups` that of each symmetry group; `cpu_s`: CPU-seconds by
    activity ("merge", "evaluate", "checkpoint")."""

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
        """CPU-seconds of the merge itself, evaluation apart."""
        return self.cpu_s.get("merge", 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged(AgentEvent):
    """A merge is done. `contributions` list self first; their weights sum to 1; `heard` of `expected` peers came in
    time, refused ones among them. `push_weight`: the agent's own push-sum weight after the merge, where one is kept."""

    contributions: tuple[Contribution, ...]
    heard: int = 0
    expected: int = 0
    result: MergeResult = field(default_factory=MergeResult)
    push_weight: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; the result's that a log holds stand among the event's own."""
        plain = Event.to_dict(self)
        del plain["result"]
        return {**plain, **{name: getattr(self.result, name) for name in MERGE_LOGGED}}


MERGE_LOGGED = ("before", "after", "accepted", "merge_s", "notes")
"""The part of a merge's result that its event writes; the rest stands in the record of the merge (lineage.jsonl)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsSkipped(AgentEvent):
    """An agent goes on with `round` and leaves out the rounds from `first` on: the network is ahead, or other content
    may have been published under them before a checkpoint was lost."""

    first: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined(AgentEvent):
    """A newcomer takes part from `round` on. `how`: "adopt" (it has taken over the weights of `peer`), "align" (it
    keeps its own), or "found" (nobody was heard: it begins a network)."""

    how: str
    peer: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(AgentEvent):
    """An agent goes on from its checkpoint of `round`. `stage`: "trained", "merged" or "joined"; with "training", which
    may follow one of the others, in the middle of that round's training."""

    stage: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentCrashed(AgentEvent):
    """An agent is gone without a word (simulator only). `back_s`: when it comes back, None for never."""

    back_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentLeft(AgentEvent):
    """An agent has left. `reason`: "done", "target", "time", or why it was stopped."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinksCut(Event):
    """The network falls apart into groups that do not hear each other (simulator only)."""

    groups: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinksHealed(Event):
    """A partition is over (simulator only)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpointed(AgentEvent):
    """State is written. `stage`: "trained" (before publishing), "merged" or "joined"; "training": what a round has
    trained so far, kept beside the checkpoint before. A daemon's survives power loss; the simulator writes them where
    agents may crash, and does not wait for the disk."""

    stage: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundFinished(AgentEvent):
    """An agent's round is over: all that is known of it, made by `AgentView.round_finished`.

    `heard` of `expected` peers came in time; `loss`: mean training loss, None where the round had no training;
    `contributions` list the agent itself first, and are empty where the round had no merge; `late` and `refused`: why,
    by peer; `seconds`: by phase ("train", "wait", "merge"), those that are known; the others as `Trained`, `Published`
    and `Merged` have them."""

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
    """How a real agent's network is: told when a connection or the DHT changes, after a round, and every few seconds.

    `connected`: peers that are reached now; `heard_at_s`: when each peer's last byte came (Unix seconds); `sent`,
    `received`: bytes of payload by peer and encoding, `retries`: attempts to fetch after the first, by peer, and
    `dht_restarts`, all since this process started. `dht_up`: None without a DHT. `own_disk_bytes`,
    `received_disk_bytes`: what snapshots take on disk, own and peers'."""

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
    """All agents ended a round (simulator only): the line that a person reads. Metrics are over the agents;
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
    """Something that a person should know and that does not stop the run."""

    message: str
    agent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished(Event):
    """A run ended. `reason`: "done" or "stopped"."""

    reason: str
    rounds_done: int
    wall_s: float
