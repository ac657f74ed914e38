"""How an agent is, judged by what is known: running, late, lost or gone. Pure."""

from __future__ import annotations

from dimat.ui.dashboard.model import Agent, RunModel, State
from dimat.ui.text import seconds_text

SILENT_S = 60.0
"""A real agent that cannot be asked is taken for lost after so long without an event, or five of its rounds."""
BEHIND = 2
"""An agent so many rounds behind the middle one is shown as late."""


def judged(known: RunModel, agent: Agent, at: float, middle: int) -> tuple[State, str]:
    """Return how an agent is, and why, at a time of the run's clock; `middle`: the round of the middle agent."""
    if agent.crashed:
        back = "" if agent.back_s is None else f", back after {seconds_text(agent.back_s)}"
        return "lost", f"crashed in round {agent.round}{back}"
    if agent.left:
        return "left", agent.left
    if known.finished and agent.own:
        return "left", f"the run ended: {known.finished}"
    if agent.alive is False:
        return "lost", "its process does not answer"
    if not agent.own:
        return _judged_by_others(agent)
    silence = at - agent.event_s
    if not known.simulated and agent.alive is None and silence > max(SILENT_S, 5 * (agent.round_s or 0.0)):
        return "lost", f"no event for {seconds_text(silence // 10 * 10)}"
    for edge in known.readers[agent.name]:
        if edge.late and edge.late >= known.agents[edge.reader].merged:
            return "late", f"{edge.reader} did not have its snapshot in round {edge.late} ({edge.fault})"
    if agent.round and agent.round <= middle - BEHIND:
        return "late", f"{middle - agent.round} rounds behind the others"
    return "running", ""


def _judged_by_others(agent: Agent) -> tuple[State, str]:
    if not agent.told:
        return ("running", "it answers") if agent.alive else ("unknown", "known by name only")
    troubles = {reader: trouble for reader, trouble in sorted(agent.told.items()) if trouble}
    if len(troubles) < len(agent.told):
        return "running", f"connected to {next(r for r, trouble in sorted(agent.told.items()) if not trouble)}"
    reader, trouble = next(iter(troubles.items()))
    if "has left" in trouble:
        return "left", trouble
    return "lost", f"{reader} does not reach it: {trouble}"
