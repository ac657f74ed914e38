"""A plugin of pytest that says what each test costs in CPU-seconds, its processes included: `make test-times`.

A test is charged with what the test process and all its living descendants, those of fork servers among them, have
spent meanwhile, waited-for children included; a fixture of a module or session is charged to the first test that asks
for it. Wall time would say more of the machine's other work than of the tests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

MARKERS = ("live", "zoo", "page", "slow")


@dataclass
class Cost:
    """What one test has cost. `markers`: those of `MARKERS` that it has."""

    test: str
    markers: str
    cpu_s: float


def spent() -> float:
    """Return the CPU-seconds of this process and its descendants so far."""
    this = psutil.Process()
    total = 0.0
    for process in (this, *this.children(recursive=True)):
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.Error:
            continue
    return total


class Times:
    """Measures tests, or gathers what workers have measured."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self.costs: list[Cost] = []

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        before = spent()
        done = yield
        markers = [name for name in MARKERS if item.get_closest_marker(name) is not None]
        self.costs.append(Cost(item.nodeid, " ".join(markers), spent() - before))
        return done

    def pytest_sessionfinish(self) -> None:
        output = getattr(self._config, "workeroutput", None)
        if output is not None:
            output["times"] = [astuple(cost) for cost in self.costs]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.costs += [Cost(*values) for values in getattr(node, "workeroutput", {}).get("times", ())]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        self.costs.sort(key=lambda cost: -cost.cpu_s)
        by_file: defaultdict[str, float] = defaultdict(float)
        by_marker: defaultdict[str, float] = defaultdict(float)
        for cost in self.costs:
            by_file[cost.test.partition("::")[0]] += cost.cpu_s
            for name in cost.markers.split() or ["none of them"]:
                by_marker[name] += cost.cpu_s
        top = self._config.getoption("times_top")
        show = terminalreporter.write_line
        terminalreporter.section("CPU-seconds")
        for title, rows in (
            ("test", {cost.test: cost.cpu_s for cost in self.costs}),
            ("file", dict(sorted(by_file.items(), key=lambda row: -row[1]))),
            ("marker", by_marker),
        ):
            show(f"by {title}:")
            for name, seconds in list(rows.items())[:top]:
                show(f"{seconds:9.2f}  {name}")
        show(f"{sum(cost.cpu_s for cost in self.costs):9.2f}  all {len(self.costs)} tests")
        write(Path(self._config.getoption("times_file")), self.costs)


def write(file: Path, costs: list[Cost]) -> None:
    """Write all costs as a table of tab-separated values."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{cost.cpu_s:.2f}\t{cost.markers}\t{cost.test}\n" for cost in costs]
    file.write_text("cpu_s\tmarkers\ttest\n" + "".join(rows))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("times", "CPU-seconds of tests")
    group.addoption("--times-top", type=int, default=40, help="lines of each table (default 40)")
    group.addoption("--times-file", default="build/test-times.tsv", help="where the whole table goes")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Times(config), "dimat-times")
