"""The health of an agent: running, late, lost or gone. Pure."""

from __future__ import annotations

from dimat.ui.dashboard.field_values import text
from dimat.ui.dashboard.model import AgentModel, RunModel, State
from dimat.ui.text import seconds_text

SILENT_S = 60.0
"""A real agent that cannot be asked counts as lost after this time, or five of its rounds, without an event."""
BEHIND = 2
"""An agent this many rounds behind the median agent is shown as late."""


def health_of(run: RunModel, agent: AgentModel, at: float, middle: int) -> tuple[State, str]:
    """Return an agent's state, and why, at a time of the run's clock; `middle`: the round of the median agent."""
    view = agent.view
    if view.crashed:
        back = "" if view.back_s is None else f", back after {seconds_text(view.back_s)}"
        return "lost", f"crashed in round {view.round}{back}"
    if view.left:
        return "left", text(view.left)
    if run.finished and agent.own:
        return "left", f"the run ended: {run.finished}"
    if agent.alive is False:
        return "lost", "its process does not answer"
    if not agent.own:
        return _health_by_others(agent)
    silence = at - agent.event_s
    if not run.simulated and agent.alive is None and silence > max(SILENT_S, 5 * (agent.round_s or 0.0)):
        return "lost", f"no event for {seconds_text(silence // 10 * 10)}"
    for edge in run.readers[agent.name]:
        if edge.late and edge.late >= run.agents[edge.reader].merged:
            return "late", f"{edge.reader} did not have its snapshot in round {edge.late} ({edge.fault})"
    if view.round and view.round <= middle - BEHIND:
        return "late", f"{middle - view.round} rounds behind the others"
    return "running", ""


def _health_by_others(agent: AgentModel) -> tuple[State, str]:
    if not agent.link_faults:
        return ("running", "it answers") if agent.alive else ("unknown", "known by name only")
    troubles = {reader: trouble for reader, trouble in sorted(agent.link_faults.items()) if trouble}
    if len(troubles) < len(agent.link_faults):
        return "running", f"connected to {next(r for r, trouble in sorted(agent.link_faults.items()) if not trouble)}"
    reader, trouble = next(iter(troubles.items()))
    if "has left" in trouble:
        return "left", trouble
    return "lost", f"{reader} does not reach it: {trouble}"
