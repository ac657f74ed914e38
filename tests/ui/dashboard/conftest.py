"""What the dashboard's tests share."""

from __future__ import annotations

from tests.agent.conftest import free_ports

__all__ = ["free_ports"]
