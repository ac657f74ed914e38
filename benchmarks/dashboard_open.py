"""How long does it take until the dashboard of a run with 1,000 agents is there?

A run folder is made with the real listener: 1,000 agents on a ring, 20 rounds (`--quick`: 10), the events of a
simulated run with the values of a real one's size. Then `dimat dashboard` is started on it as a process, and the time
is taken until the whole state is there to be drawn, and, where Chromium is on the machine, until a browser has drawn
the network (wall time; interpreter and imports are in it). Reference: three seconds.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import httpx
from _common import Result, finish, options, table

from dimat import events
from dimat.events.view import AgentView
from dimat.ui.jsonl import JsonlListener

AGENTS = 1_000
LIMIT_S = 3.0
BYTES = 59_944
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]


def told(rounds: int) -> Iterator[events.Event]:
    """Yield the events of a run on a ring."""
    names = [f"agent-{i}" for i in range(AGENTS)]
    ring = tuple((names[i], names[(i + 1) % AGENTS]) for i in range(AGENTS))
    histogram = {name: tuple((7 * i + 3 * c) % 60 for c in range(10)) for i, name in enumerate(names)}
    yield events.RunStarted(
        run="thousand",
        method="dimat",
        seed=0,
        agents=tuple(names),
        edges=ring,
        rounds=rounds,
        parameters=14_458,
        snapshot_bytes=BYTES,
        histogram=histogram,
    )
    for number in range(1, rounds + 1):
        for i, name in enumerate(names):
            yield from a_round(names, i, name, number)
    yield events.RunFinished(run="thousand", reason="done", rounds_done=rounds, wall_s=1.0, time_s=float(rounds))


def a_round(names: list[str], i: int, name: str, number: int) -> Iterator[events.Event]:
    """Yield the events of an agent's round."""
    view = AgentView(name)
    for event in steps(names, i, name, number):
        view.take(event)
        yield event
    end = view.round_finished(number, bytes_sent=2 * BYTES, bytes_received=2 * BYTES)
    yield replace(end, run="thousand", time_s=float(number))


def steps(names: list[str], i: int, name: str, number: int) -> Iterator[events.Event]:
    """Yield the events of an agent's round before its end."""
    common = {"run": "thousand", "agent": name, "round": number}
    start, end = float(number - 1), float(number)
    peers = (names[i - 1], names[(i + 1) % AGENTS])
    roots = {who: f"{hash((who, number)) & (1 << 256) - 1:064x}" for who in (name, *peers)}
    level = 0.95 - 0.6 * math.exp(-number / 4) - 0.02 * math.sin(i)
    yield events.RoundStarted(**common, time_s=start)
    trained = events.TrainResult(loss=2 * math.exp(-number / 5), samples=288)
    yield events.Trained(**common, time_s=end, result=trained, train_s=0.1)
    yield events.Checkpointed(**common, time_s=end, stage="trained")
    yield events.Published(**common, time_s=end, snapshot=roots[name], bytes=BYTES, basis="0:agent-0:1b589c379cb7aa14")
    for peer in peers:
        yield events.SnapshotFetched(**common, time_s=end, peer=peer, snapshot=roots[peer], bytes=BYTES)
    yield events.Merged(
        **common,
        time_s=end,
        contributions=tuple(
            events.Contribution(agent=who, snapshot=root, round=number, weight=1 / 3, verdict="same basis")
            for who, root in roots.items()
        ),
        heard=2,
        expected=2,
        result=events.MergeResult(
            before={"loss": 1.65746697, "accuracy": level - 0.02, "nll": 1.65746697},
            after={"loss": 1.61165564, "accuracy": level, "nll": 1.61165564},
            cpu_s={"merge": 0.1665213},
        ),
    )


def measure(folder: Path, browser: str | None) -> tuple[float, float | None]:
    """Return the seconds until the state is there, and until a browser has drawn it."""
    said = folder / "dashboard.err"
    command = [sys.executable, "-m", "dimat.cli", "dashboard", str(folder), "--listen", "127.0.0.1:0"]
    start = time.perf_counter()
    with said.open("wb") as stream:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stream, env=os.environ)
    try:
        while not (found := re.search(r"http://\S+/", said.read_text())):
            if process.poll() is not None:
                raise RuntimeError(said.read_text())
            time.sleep(0.02)
        state = httpx.get(f"{found[0]}api/state", timeout=60).json()
        there = time.perf_counter() - start
        if len(state["agents"]) != AGENTS or len(state["edges"]) != 2 * AGENTS:
            raise RuntimeError("the state is not whole")
        drawn = None if browser is None else draw(found[0], browser)
        return there, drawn
    finally:
        process.kill()
        process.wait()


def draw(address: str, program: str) -> float:
    """Return the seconds from opening the page until all agents are in the picture and in the table."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=FLAGS)
        page = started.new_page()
        start = time.perf_counter()
        page.goto(address)
        nodes = "(document.getElementById('graph')._cyreg?.cy.nodes() ?? []).length"
        while (
            page.evaluate(nodes) < AGENTS or page.evaluate("document.querySelectorAll('#agents tbody tr').length") < 100
        ):
            page.wait_for_timeout(20)
        drawn = time.perf_counter() - start
        started.close()
        return drawn


def main() -> None:
    arguments = options(__doc__.splitlines()[0]).parse_args()
    rounds, repeats = (10, 1) if arguments.quick else (20, 3)
    browser = shutil.which("chromium")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with closing(JsonlListener(folder / "events.jsonl")) as log:
            for event in told(rounds):
                log(event)
        lines = sum(1 for _ in (folder / "events.jsonl").open("rb")) - 1
        size_mb = (folder / "events.jsonl").stat().st_size / 1e6
        runs = [measure(folder, browser) for _ in range(repeats)]
    rows = [
        (AGENTS, rounds, f"{lines:,}", round(size_mb, 1), there, "no browser" if drawn is None else drawn)
        for there, drawn in runs
    ]
    table(("agents", "rounds", "events", "MB", "s to the state", "s to draw"), rows)
    measured = statistics.median(there + (drawn or 0.0) for there, drawn in runs)
    met = measured < LIMIT_S
    finish(Result("dashboard_open", measured, LIMIT_S, measured / LIMIT_S, f"< {LIMIT_S:.0f} s", met))


if __name__ == "__main__":
    main()
