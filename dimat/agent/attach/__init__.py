"""An agent beside somebody's own training loop: the loop trains, the agent swaps weights, aligns and merges."""

from dimat.agent.attach.agent import Agent

__all__ = ["Agent"]
