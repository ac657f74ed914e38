"""What the dashboard knows of one agent, one link and one merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["running", "late", "lost", "left", "unknown"]


@dataclass(slots=True)
class Point:
    """One round of one agent: mean training loss, and test metrics before and after the merge."""

    loss: float | None = None
    before: Mapping[str, Any] = field(default_factory=dict[str, Any])
    after: Mapping[str, Any] = field(default_factory=dict[str, Any])
    version: int = 0


@dataclass(slots=True)
class Agent:
    """One agent. `own`: its own events are read, not only what others tell of it; `alive`: what asking it directly
    told, None where it was not asked; `told`: by agent that listens to it, what is wrong with the link, "" for
    nothing; `merged`: round of its last merge; times in seconds of the run's clock; bytes since the log began."""

    name: str
    own: bool = False
    round: int = 0
    phase: str = ""
    merged: int = 0
    event_s: float = 0.0
    finished_s: float | None = None
    round_s: float | None = None
    address: str = ""
    samples: int = 0
    secure: bool | None = None
    loss: float | None = None
    after: Mapping[str, Any] = field(default_factory=dict[str, Any])
    before: Mapping[str, Any] = field(default_factory=dict[str, Any])
    heard: int = 0
    expected: int = 0
    accepted: float | None = None
    basis: str = ""
    sent: int = 0
    received: int = 0
    left: str = ""
    crashed: bool = False
    back_s: float | None = None
    checkpoint: int | None = None
    warnings: int = 0
    alive: bool | None = None
    told: dict[str, str] = field(default_factory=dict[str, str])
    histogram: tuple[int, ...] = ()
    points: dict[int, Point] = field(default_factory=dict[int, Point])
    state: State = "unknown"
    why: str = ""
    version: int = 0


@dataclass(slots=True)
class Edge:
    """A link: `reader` listens to `source`. `used`: round of the snapshot in the reader's last merge that had one;
    `late`: the reader's last round that it was missing in; `fault`: why."""

    source: str
    reader: str
    bytes: int = 0
    used: int | None = None
    late: int = 0
    fault: str = ""
    version: int = 0


@dataclass(slots=True)
class Merge:
    """One merge. `parts`: contributions as the event has them; `missing`: peers that were late or refused, and why;
    `done`: the merge itself has been told."""

    agent: str
    round: int
    time_s: float = 0.0
    parts: Sequence[Any] = ()
    heard: int = 0
    expected: int = 0
    before: Mapping[str, Any] = field(default_factory=dict[str, Any])
    after: Mapping[str, Any] = field(default_factory=dict[str, Any])
    accepted: float | None = None
    merge_s: float | None = None
    notes: tuple[str, ...] = ()
    missing: dict[str, str] = field(default_factory=dict[str, str])
    done: bool = False
    version: int = 0


@dataclass(slots=True)
class Adoption:
    """An agent permuted itself into a peer's basis; `moved`: share of its units whose place changed, and in `groups` by
    symmetry group."""

    agent: str
    round: int
    peer: str
    moved: float | None
    groups: dict[str, float] = field(default_factory=dict[str, float])
    version: int = 0
