"""Settings of all tests: workers share few cores, so each computes with one thread, and no test waits on a clock."""

from __future__ import annotations

import gc
import os
import re
import signal
import tempfile
from collections.abc import Generator
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests.faults.seeds import first_seed
from tests.forks import end_servers
from tests.order import spread

_scratch = tempfile.TemporaryDirectory(prefix="dimat-tests-")
os.environ["XDG_CACHE_HOME"] = _scratch.name  # tests, and the processes that they start, leave the user's cache alone

# a background job ignores Ctrl-C, one under `nohup` SIGHUP too, and what they start inherits that; some tests
# send these signals to the processes that they start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

torch.set_num_threads(1)
settings.register_profile("dimat", deadline=None)
settings.load_profile("dimat")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Two workers more than cores (`-n auto`): tests of real agents wait for peers and deadlines much of their time.
    One more where those are left out: few tests wait there, and each worker imports everything."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting = not re.search(r"not\b.*\blive\b", config.option.markexpr or "")
    return (cores + 2 if waiting else cores + 1) if config.option.numprocesses == "auto" else None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage while modules are imported: there is none, and a quarter of the time went there. What was
    imported stays, so that later looks pass it over."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where workers share the tests, each is to have some that wait and some that compute."""
    if hasattr(config, "workerinput"):
        waiting = ("live", "page")
        items[:] = spread(items, lambda item: item.path, lambda item: any(map(item.get_closest_marker, waiting)))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dimat", "how much is tested")
    group.addoption("--all", action="store_true", help="all fault schedules and larger cases, as `make test-all`")
    group.addoption("--fault-seed", type=int, help="the first seed of the fault schedules (default: by the commit)")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave larger cases to `--all`."""
    if item.get_closest_marker("more") is not None and not item.config.getoption("all"):
        pytest.skip("a larger case, with --all")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say which fault schedules were run, so that they can be run again at another commit."""
    reports = (report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ()))
    if any("test_promises_hold" in getattr(report, "nodeid", "") for report in reports):
        seed = first_seed(config.getoption("fault_seed"))
        terminalreporter.write_line(f"fault schedules from seed {seed}; again: --fault-seed {seed}")


def pytest_unconfigure() -> None:
    """Processes that tests have forked, and those that fork them, end with the tests."""
    end_servers()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Asynchronous tests run on asyncio."""
    return "asyncio"
