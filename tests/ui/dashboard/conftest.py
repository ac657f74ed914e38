"""What the dashboard's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.agent.conftest import free_ports
from tests.ui.dashboard.runs import write_run
from tests.ui.dashboard.serving import chromium, serving, started_browser

__all__ = ["free_ports"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for the tests of a module; each opens pages of its own."""
    with started_browser() as started:
        yield started


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a dashboard of the run that `tests.ui.dashboard.runs` makes; for tests that only look at it."""
    chromium()
    folder = tmp_path_factory.mktemp("served")
    write_run(folder / "run")
    with serving(folder / "run", folder / "said") as address:
        yield address
