"""What the tests of the listeners and reports share."""

from __future__ import annotations

import pytest

from dimat.results import Comparison, Results
from tests.ui.samples import make_comparison, make_results


@pytest.fixture
def results() -> Results:
    return make_results()


@pytest.fixture
def comparison() -> Comparison:
    return make_comparison()


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal that the tests happen to run in decides nothing."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("LINES", "40")
