"""Folders of runs, made with the real listener."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from dimat.events import (
    AgentCrashed,
    BasisAdopted,
    Contribution,
    Event,
    Merged,
    MergeResult,
    PeerLate,
    RoundFinished,
    Warned,
)
from dimat.ui.jsonl import JsonlListener
from tests.ui.samples import make_events

MARKUP = "<img src=x onerror=alert(1)>"


def told(rounds: int = 3) -> list[Event]:
    """Return a run with an agent that is late, one that crashed, and a text that would be markup."""
    *events, last = make_events(rounds=rounds)
    agents = ("lab-a", "lab-b", "lab-c")
    merges: list[Event] = []
    for number, agent in itertools.product(range(1, rounds + 1), agents):
        parts = tuple(
            Contribution(agent=who, snapshot="s", round=number, weight=1 / 3, verdict="own" * (who == agent))
            for who in (agent, *(other for other in agents if other != agent))
        )
        before = {"accuracy": 0.4 + 0.1 * number, "loss": 1.0}
        after = {"accuracy": 0.5 + 0.1 * number, "loss": 0.9}
        common: dict[str, Any] = {"agent": agent, "round": number, "heard": 2, "expected": 2, "time_s": float(number)}
        merges += [
            Merged(contributions=parts, result=MergeResult(before=before, after=after), **common),
            RoundFinished(
                bytes_sent=0,
                bytes_received=0,
                loss=1.2 / number,
                samples=288,
                contributions=parts,
                before=before,
                after=after,
                late={"lab-c": "deadline"} if (agent, number) == ("lab-a", rounds) else {},
                **common,
            ),
        ]
    return [
        *events,
        *merges,
        PeerLate(agent="lab-a", round=rounds, peer="lab-c", time_s=90.0),
        BasisAdopted(
            agent="lab-a", round=1, peer="lab-b", basis="0:lab-b:1", moved=0.75, groups={"conv": 0.5}, time_s=90.0
        ),
        Warned(message=f"a peer calls itself {MARKUP}", agent="lab-a", time_s=91.0),
        AgentCrashed(agent="lab-c", round=rounds, back_s=None, time_s=92.0),
        last,
    ]


def write_log(file: Path, events: Iterable[Event]) -> Path:
    """Write events as a run does."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with closing(JsonlListener(file)) as log:
        for event in events:
            log(event)
    return file


def write_run(folder: Path) -> Path:
    """Write the log of a run into a folder."""
    write_log(folder / "events.jsonl", told())
    return folder
