"""Settings of all tests: workers share few cores, so each computes with one thread, and no test waits on a clock."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch
from hypothesis import settings

_scratch = tempfile.TemporaryDirectory(prefix="dimat-tests-")
os.environ["XDG_CACHE_HOME"] = _scratch.name  # tests, and the processes that they start, leave the user's cache alone

torch.set_num_threads(1)
settings.register_profile("dimat", deadline=None)
settings.load_profile("dimat")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Asynchronous tests run on asyncio."""
    return "asyncio"
