"""A plugin of pytest that says what each test costs in CPU-seconds and in wall time: `make test-times`.

A test is charged with what the test process and all its living descendants, those of fork servers among them, have
spent meanwhile, waited-for children included; a fixture of a module or session is charged to the first test that asks
for it, and imports and collection, once a worker, to a row of their own. Where two tests take equally long, one may
compute and one wait: CPU-seconds tell; wall time says something of the machine's other work, too. The table is
written when the run is interrupted as well.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

MARKERS = ("live", "zoo", "page", "slow")
COLLECTION = "(imports and collection)"


@dataclass
class Cost:
    """What one test has cost. `markers`: those of `MARKERS` that it has."""

    test: str
    markers: str
    cpu_s: float
    wall_s: float


def spent() -> float:
    """Return the CPU-seconds of this process and its descendants so far. Some milliseconds: it looks at all processes
    of the machine."""
    this = psutil.Process()
    total = 0.0
    for process in (this, *this.children(recursive=True)):
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.Error:
            continue
    return total


class Times:
    """Measures tests where they run; a report carries what its test has cost to where it is shown."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._begun = (0.0, psutil.Process().create_time())
        self._collected: dict[str, Any] | None = None
        self.costs: list[Cost] = []

    def _cost(self, test: str, markers: str) -> dict[str, Any]:
        """Return what was spent since the last call."""
        now = (spent(), time.time())
        cost = Cost(test, markers, now[0] - self._begun[0], now[1] - self._begun[1])
        self._begun = now
        return asdict(cost)

    def pytest_collection_finish(self) -> None:
        self._collected = self._cost(COLLECTION, "")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
        report = yield
        if call.when == "teardown":
            markers = [name for name in MARKERS if item.get_closest_marker(name) is not None]
            report.costs = [self._cost(item.nodeid, " ".join(markers))]
            if self._collected is not None:
                report.costs.append(self._collected)
                self._collected = None
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        if not hasattr(self._config, "workerinput"):
            self.costs += [Cost(**cost) for cost in getattr(report, "costs", ())]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        tables = {"test": self.costs, "file": total(self.costs, _file), "folder": total(self.costs, _folder)}
        tables["marker"] = total(self.costs, lambda cost: cost.markers or "none of them")
        show = terminalreporter.write_line
        terminalreporter.section("CPU-seconds, wall seconds")
        for title, costs in tables.items():
            show(f"by {title}:")
            for cost in sorted(costs, key=lambda cost: -cost.cpu_s)[: self._config.getoption("times_top")]:
                show(f"{cost.cpu_s:9.2f} {cost.wall_s:9.2f}  {cost.test}")
        for cost in total(self.costs, lambda _: "all"):
            show(f"{cost.cpu_s:9.2f} {cost.wall_s:9.2f}  all {len(self.costs)} rows")
        write(Path(self._config.getoption("times_file")), self.costs)


def total(costs: list[Cost], key: Any) -> list[Cost]:
    """Return the sums of costs by what `key` gives for each."""
    sums: defaultdict[str, list[Cost]] = defaultdict(list)
    for cost in costs:
        sums[key(cost)].append(cost)
    return [
        Cost(name, "", sum(cost.cpu_s for cost in each), sum(cost.wall_s for cost in each))
        for name, each in sums.items()
    ]


def _file(cost: Cost) -> str:
    return cost.test.partition("::")[0]


def _folder(cost: Cost) -> str:
    return _file(cost).rpartition("/")[0] or _file(cost)


def write(file: Path, costs: list[Cost]) -> None:
    """Write all costs as a table of tab-separated values, the most CPU-seconds first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        f"{cost.cpu_s:.2f}\t{cost.wall_s:.2f}\t{cost.markers}\t{cost.test}\n"
        for cost in sorted(costs, key=lambda cost: -cost.cpu_s)
    ]
    file.write_text("cpu_s\twall_s\tmarkers\ttest\n" + "".join(rows))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("times", "CPU-seconds and wall time of tests")
    group.addoption("--times-top", type=int, default=40, help="lines of each table (default 40)")
    group.addoption("--times-file", default="build/test-times.tsv", help="where the whole table goes")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Times(config), "dimat-times")
