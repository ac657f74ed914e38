"""What an agent's own events tell of how it is, for `dimat status`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from dimat import events as facts


class View:
    """The newest of what happened to one agent."""

    def __init__(self, agent: str, run: str) -> None:
        self.leaving = asyncio.Event()
        self._started = time.time()
        self._values: dict[str, object] = {"agent": agent, "run": run, "started": self._started}
        self._warnings: list[str] = []

    def note(self, fact: facts.Event) -> None:
        """Take an event in."""
        values = self._values
        match fact:
            case facts.Trained(loss=loss, round=number):
                values["trained"] = {"round": number, "loss": loss}
            case facts.Merged():
                values["merged"] = {
                    "round": fact.round,
                    "heard": fact.heard,
                    "expected": fact.expected,
                    "accepted": fact.accepted,
                    "before": dict(fact.before),
                    "after": dict(fact.after),
                    "weights": {part.agent: part.weight for part in fact.contributions},
                }
            case facts.Checkpointed(round=number, stage=stage, time_s=at):
                values["checkpoint"] = {"round": number, "stage": stage, "time": at}
            case facts.Warned(message=message):
                self._warnings = [*self._warnings[-4:], message]
            case facts.PeerRefused(peer=peer, reason=reason):
                self._warnings = [*self._warnings[-4:], f"{peer} refused: {reason}"]
            case facts.AgentLeft(reason=reason):
                values["left"] = reason
            case _:
                pass

    def plain(self) -> Mapping[str, object]:
        """Return all that is known, as plain values. `time`, `started`: Unix seconds."""
        return {**self._values, "time": time.time(), "warnings": list(self._warnings)}
