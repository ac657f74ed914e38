"""An agent beside a user's own training loop: the loop trains, the agent swaps and merges."""

from dimat.agent.attach.agent import Agent

__all__ = ["Agent"]
