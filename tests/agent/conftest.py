"""What tests of real agents share."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest


@pytest.fixture
def free_ports() -> list[int]:
    """Eight ports on loopback that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(8)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
