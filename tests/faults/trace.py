"""What happened in a simulated network, written for people."""

from __future__ import annotations

from typing import Any

from dimat.agent.protocol import messages as m
from tests.faults.node import Node


def show(now: float, node: Node, event: m.Event, actions: list[m.Action]) -> str:
    """Write one step for people."""
    head = f"{now:9.3f}  {node.name}  {brief(event)}"
    return head + "".join(f"\n{'':16}→ {brief(action)}" for action in actions)


def brief(thing: Any) -> str:
    """Write an event or action short enough to read a thousand of."""
    match thing:
        case m.Emit():
            return f"Report {thing.fact}"
        case m.CheckpointAction():
            return f"Checkpoint({thing.round}, {thing.stage!r}, basis={thing.state.basis})"
        case m.MapChanged():
            return "MapChanged"
        case _:
            return str(thing)
