"""What tests of the network share."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest


@pytest.fixture(scope="session", autouse=True)
async def one_loop(anyio_backend: str) -> AsyncGenerator[None]:
    """All tests of a process share an event loop: gRPC hands out late events of earlier calls, and reports a loop that
    was closed meanwhile as a fault of whichever test runs then."""
    del anyio_backend
    yield  # noqa: PT022  (a generator keeps the loop until the session ends)
