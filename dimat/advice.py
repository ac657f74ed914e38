"""The findings of `dimat advise`: the table of its probes, and the settings to change.

Kept on the lowest floor because the simulator makes them, the terminal shows them, and these two must not know each
other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast


@dataclass(frozen=True, slots=True)
class ProbeRow:
    """One form of an experiment, in short runs.

    `factor` and `option`: what was varied, and how; `values`: the test metric at the end, mean over agents, for each
    seed; `gain`: its mean over seeds minus that of the form that this factor began with; `noise`: what a gain has to
    exceed; `mb`: megabytes sent by an agent; `kept`: whether the search went on with it.
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
    """What the probes say.

    `alone`: the row of training alone, with the loss and the epochs of what is advised; `given`: that of the experiment
    as it is; `advised`: that of what is advised. `settings`: dotted keys of the experiment → values to give them, none
    where it is best as it is; `removed`: keys that these replace; `map`: the network map that holds the topology, ""
    where the experiment does; `probe`: how a probe was shortened; `cost`: what all of them took; `notes`: what was not
    tried, and what short probes cannot tell.
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
        """Whether what is advised was ahead of training alone; None where seeds cannot tell."""
        by, noise = self.advised.mean - self.alone.mean, self.alone.noise
        return None if abs(by) <= noise else by > 0

    def toml(self) -> str:
        """Return the lines to put in the experiment's file, in the place of those that are there."""
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
    """Return dotted settings as TOML tables; where `map` is a file, those of the topology are for it, in no table."""
    tables: dict[str, list[str]] = {}
    for key, value in settings.items():
        table, _, name = key.rpartition(".")
        tables.setdefault(table, []).append(f"{name} = {_value(value)}")
    for key in removed:
        table, _, name = key.rpartition(".")
        tables.setdefault(table, []).append(f"# instead of {name}, which is to go")
    lines: list[str] = []
    for table, entries in sorted(tables.items(), key=lambda item: not (map and item[0] == "topology")):
        in_map = table == "topology" and map
        head = f"# in {map}, in the place of its graph, edges or schedule" if in_map else f"[{table}]"
        lines += ["", head, *entries]
    return "\n".join(lines[1:])


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        entries = cast("Mapping[str, Any]", value).items()
        return "{ " + ", ".join(f"{key} = {_value(each)}" for key, each in entries) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(each) for each in cast("list[Any]", value)) + "]"
    return json.dumps(value, ensure_ascii=False)
