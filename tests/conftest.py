"""Settings of all tests: workers share few cores, so each computes with one thread, and no test waits on a clock."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("dimat", deadline=None)
settings.load_profile("dimat")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Asynchronous tests run on asyncio."""
    return "asyncio"
