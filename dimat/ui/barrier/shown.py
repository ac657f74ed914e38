"""The lines of `dimat barrier` for a person, as plain values, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dimat.errors import ConfigError
from dimat.merge.barrier import LOSS, Line
from dimat.ui.report.plots import line_png, require_matplotlib
from dimat.ui.symmetry.tables import check_suffix
from dimat.ui.text import Table, as_text, clean, metric_text


def barrier_lines(lines: Sequence[Line], notes: Sequence[str]) -> list[str]:
    """Return a table with a row for each way of alignment, then notes."""
    others = [name for name in lines[0].metrics if name != LOSS]
    middle = len(lines[0].shares) // 2
    headers = ("align", "barrier", "loss half-way", *(f"{clean(name)} half-way" for name in others), "moved", "CPU s")
    rows = [
        (
            line.align,
            metric_text(line.barrier),
            metric_text(line.metrics[LOSS][middle]),
            *(metric_text(line.metrics[name][middle]) for name in others),
            f"{line.moved:.0%}",
            f"{line.cpu_s:.1f}",
        )
        for line in lines
    ]
    ends = ", ".join(
        f"{clean(name)} {metric_text(values[0])} and {metric_text(values[-1])}"
        for name, values in lines[0].metrics.items()
    )
    best = {min(range(len(lines)), key=lambda i: lines[i].barrier)}
    table = Table("", headers, tuple(rows), best=frozenset((i, 1) for i in best), note=f"at the ends: {ends}")
    told = [f"{line.align}: {note}" for line in lines for note in line.notes]
    return [*as_text(table), *(f"note: {clean(note)}" for note in (*notes, *told))]


def barrier_plain(lines: Sequence[Line], notes: Sequence[str]) -> dict[str, Any]:
    """Return everything as plain values."""
    return {
        "shares": [*lines[0].shares],
        "lines": [
            {
                "align": line.align,
                "barrier": line.barrier,
                "moved": line.moved,
                "cpu_s": line.cpu_s,
                "notes": [*line.notes],
                **{name: [*values] for name, values in line.metrics.items()},
            }
            for line in lines
        ],
        "notes": [*notes],
    }


def check_picture(file: Path | None) -> None:
    """Raise ConfigError, before anything is measured, if a picture could not be written."""
    if file is not None:
        check_suffix(file, ".png")
        if not file.parent.is_dir():
            raise ConfigError(f"cannot draw to {file}: there is no folder {file.parent}")
        require_matplotlib()


def write_picture(file: Path, lines: Sequence[Line]) -> None:
    """Write the picture of all lines: a panel for each metric."""
    file.write_bytes(line_png({line.align: (line.shares, line.metrics) for line in lines}))
