"""Fixtures of the callbacks' tests: those of agents."""

from tests.agent.conftest import free_ports as free_ports
