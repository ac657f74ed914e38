"""The findings of `dimat advise`: the table of its probes, and the settings to change.

The module is on the lowest floor because the simulator makes the findings and the terminal shows them, and these two
must not import each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dimat.metrics import score_of
from dimat.toml_text import toml_value


@dataclass(frozen=True, slots=True)
class ProbeRow:
    """One variant of an experiment, measured in short runs.

    `factor` and `option`: the factor that was varied and its value; `values`: the final test metric for each seed, mean
    over agents; `gain`: how much better its mean over seeds is than that of the variant from which this factor started;
    `noise`: the threshold that a gain has to exceed; `mb`: megabytes sent by an agent; `kept`: whether the search
    continued with it.
    """

    factor: str
    option: str
    values: tuple[float, ...]
    gain: float
    noise: float
    mb: float
    kept: bool

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return sum(self.values) / len(self.values)

    @property
    def std(self) -> float:
        """The standard deviation over seeds, 0 for one."""
        return (sum((v - self.mean) ** 2 for v in self.values) / max(len(self.values) - 1, 1)) ** 0.5


@dataclass(frozen=True, slots=True)
class Advice:
    """The result of the probes.

    `alone`: the row of training alone, with the loss and the epochs of the advised variant; `given`: the row of the
    experiment as it is; `advised`: the row of the advised variant. `settings`: dotted keys of the experiment → their
    new values, empty if the experiment is best as it is; `removed`: keys that these replace; `map`: the network map
    that holds the topology, "" if the experiment holds it; `probe`: how a probe was shortened; `cost`: the cost of all
    probes; `notes`: options that were not tried, and limits of short probes.
    """

    metric: str
    rows: tuple[ProbeRow, ...]
    alone: ProbeRow
    given: ProbeRow
    advised: ProbeRow
    settings: Mapping[str, Any]
    removed: tuple[str, ...]
    map: str
    probe: str
    cost: str
    notes: tuple[str, ...]

    @property
    def ahead(self) -> bool | None:
        """Whether the advised variant was ahead of training alone; None if the seeds cannot tell."""
        by, noise = score_of(self.metric, self.advised.mean - self.alone.mean), self.alone.noise
        return None if abs(by) <= noise else by > 0

    def toml(self) -> str:
        """Return the lines for the experiment's file; they replace the present lines of the same keys."""
        return as_toml(self.settings, self.removed, self.map)

    def to_plain(self) -> dict[str, Any]:
        """Return plain values, with means, spreads and TOML."""
        rows = [{**asdict(row), "mean": row.mean, "std": row.std} for row in (*self.rows, self.alone)]
        by = self.advised.mean - self.alone.mean
        return {
            "metric": self.metric,
            "rows": rows,
            "settings": dict(self.settings),
            "removed": list(self.removed),
            "toml": self.toml(),
            "alone": self.alone.mean,
            "given": self.given.mean,
            "advised": self.advised.mean,
            "ahead_of_alone": self.ahead,
            "by": by,
            "probe": self.probe,
            "cost": self.cost,
            "notes": list(self.notes),
        }


def as_toml(settings: Mapping[str, Any], removed: tuple[str, ...] = (), map: str = "") -> str:
    """Return dotted settings as TOML tables; if `map` is a file, those of the topology are for it, without a table."""
    tables: dict[str, list[str]] = {}
    for key, value in settings.items():
        table, _, name = key.rpartition(".")
        tables.setdefault(table, []).append(f"{name} = {toml_value(value)}")
    for key in removed:
        table, _, name = key.rpartition(".")
        tables.setdefault(table, []).append(f"# instead of {name}, which is to go")
    lines: list[str] = []
    for table, entries in sorted(tables.items(), key=lambda item: not (map and item[0] == "topology")):
        in_map = table == "topology" and map
        head = f"# in {map}, in the place of its graph, edges or schedule" if in_map else f"[{table}]"
        lines += ["", head, *entries]
    return "\n".join(lines[1:])
