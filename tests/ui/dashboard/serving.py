"""A dashboard in a process of its own, and the browser that looks at it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.agent.processes import PATIENCE_S, ROOT
from tests.forks import Process, start

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def serving(folder: Path, said: Path, *options: str) -> Iterator[str]:
    """Serve a folder with `dimat dashboard` on a free port, and give its address."""
    words = ["-m", "dimat.cli", "dashboard", str(folder), "--listen", "127.0.0.1:0", *options]
    with said.open("wb") as stream:
        process = start(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=stream.fileno())
    try:
        yield address_in(said, process)
    finally:
        process.kill()
        process.wait()


def address_in(said: Path, process: subprocess.Popen[bytes] | Process) -> str:
    """Wait until a process has said where its dashboard is, and return the address."""

    def found() -> re.Match[str] | None:
        assert process.poll() is None, said.read_text()
        return re.search(r"http://\S+/", said.read_text())

    return until(found, "the dashboard's address")[0]


def until(true: Callable[[], Any], what: str) -> Any:
    """Wait until something holds, and return it."""
    ends = time.monotonic() + PATIENCE_S
    while not (value := true()):
        assert time.monotonic() < ends, f"it never came: {what}"
        time.sleep(0.05)
    return value


class Looking:
    """A page in a browser, with what its console has said."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.faults: list[str] = []
        page.on("console", lambda message: self._heard(message.type, message.text))
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.set_default_timeout(1000 * PATIENCE_S)

    def _heard(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.faults.append(text)

    def until(self, expression: str) -> None:
        """Wait until an expression of the page's is true."""
        ends = time.monotonic() + PATIENCE_S
        # the page's policy forbids what Playwright's own waiting does
        while not self.page.evaluate(expression):
            if time.monotonic() > ends:
                raise AssertionError(f"it never held: {expression}\n{self.faults}\n{self.page.inner_text('body')}")
            self.page.wait_for_timeout(100)

    def open(self, view: str, address: str = "") -> None:
        """Open a view; `address`: of the dashboard, where it is not open yet."""
        if address:
            self.page.goto(address + f"#{view}")
        else:
            self.page.evaluate(f"location.hash = '{view}'")
        self.until(f"!document.getElementById('view-{view}').hidden")
        self.until("document.getElementById('facts').children.length > 0")

    def overflow(self) -> int:
        """Return by how many pixels the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@contextmanager
def started_browser() -> Iterator[Any]:
    """Start Chromium; skips the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = chromium()
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=FLAGS)
        try:
            yield started
        finally:
            started.close()


@contextmanager
def page(browser: Any, **context: Any) -> Iterator[Looking]:
    """Open a page in a browser, with nothing of the pages before."""
    opened = browser.new_context(**context)
    try:
        yield Looking(opened.new_page())
    finally:
        opened.close()


def chromium() -> str:
    """Return the browser's program; skips the test where there is none."""
    found = CHROMIUM if Path(CHROMIUM).exists() else shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine")
    return found


def views() -> Sequence[str]:
    """Return the names of all views."""
    return ("network", "curves", "merges", "lineage", "alignment", "data", "log")
