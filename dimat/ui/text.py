"""Numbers as text, and tables of finished text, for both console and report.

Everything here is pure. The cells of a `Table` are already text; `console` and `page` only format it.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from textwrap import wrap

NONE = "-"
NARROWEST = 20
"""The least number of columns to which a text is wrapped."""


@dataclass(frozen=True)
class Table:
    """A table of finished text. `left`: columns aligned left; `best`: (row, column) cells to emphasise;
    `foot`: the last row sums up the others; `note`: a line that belongs below."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: frozenset[int] = frozenset({0})
    best: frozenset[tuple[int, int]] = frozenset()
    foot: bool = False
    note: str = ""


def clean(text: str) -> str:
    """Return `text` on one line with control and format characters spelled out: texts from peers reach terminals and
    pages, and must not move a cursor or reverse a line there."""
    if text.isascii() and text.isprintable():  # nearly always, and many times as fast
        return text
    return "".join(
        char if char == " " or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else _spelled(char)
        for char in text
    )


def _spelled(char: str) -> str:
    return " " if char in "\n\t" else char.encode("unicode_escape").decode("ascii")


def metric_text(value: float | None) -> str:
    """Return a metric or loss with three decimals (four significant digits from 1,000 on)."""
    if value is None or not math.isfinite(value):
        return NONE if value is None else str(value)
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"


def distance_text(value: float) -> str:
    """Return a consensus distance: three decimals, or a power of ten if it is smaller than that."""
    return f"{value:.3f}" if value == 0 or not math.isfinite(value) or value >= 0.01 else f"{value:.1e}"


def mb_text(megabytes: float | None) -> str:
    """Return megabytes (10⁶ bytes) with about three significant digits, without the unit."""
    if megabytes is None or megabytes == 0:
        return NONE if megabytes is None else "0"
    return f"{megabytes:.3f}" if megabytes < 1 else f"{megabytes:,.{2 if megabytes < 10 else 1}f}"


def bytes_text(count: int) -> str:
    """Return a size in decimal units, e.g. `940.6 kB`."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def seconds_text(seconds: float) -> str:
    """Return a duration, e.g. `3.2 s`, `2 min 5 s`, `1 h 2 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def range_text(low: float | None, high: float | None) -> str:
    """Return `low–high`, or a dash if either was not measured."""
    return NONE if low is None or high is None else f"{metric_text(low)}–{metric_text(high)}"


def count_text(number: int, what: str) -> str:
    """Return e.g. `1 agent`, `12,000 samples`."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def listed(names: Sequence[str], most: int) -> str:
    """Return names with commas between them, and the number of those beyond `most`."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the measured values, or None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def as_text(table: Table, width: int | None = None) -> list[str]:
    """Return the table as aligned plain lines, title first, without trailing blanks. `width`: the available columns;
    text in the last column is wrapped to fit, unless almost no space is left for it."""
    grid = [table.headers, *table.rows]
    widths = [max(_width(row[column]) for row in grid) for column in range(len(table.headers))]
    lines = [table.title] if table.title else []
    last = len(widths) - 1
    room = 0 if width is None or last not in table.left else width - sum(widths[:-1]) - 2 * last
    for row in grid:
        parts = wrap(row[-1], room) or [""] if room >= NARROWEST else [row[-1]]
        for number, part in enumerate(parts):
            cells = [_padded("" if number else cell, widths[i], i in table.left) for i, cell in enumerate(row[:-1])]
            lines.append("  ".join([*cells, _padded(part, widths[-1], last in table.left)]).rstrip())
    return [*lines, table.note] if table.note else lines


def _width(text: str) -> int:
    # East Asian wide characters take two columns
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _padded(text: str, width: int, left: bool) -> str:
    blanks = " " * (width - _width(text))
    return text + blanks if left else blanks + text


def narrowed(table: Table, width: int, drop: Sequence[str], gap: int = 3) -> Table:
    """Return the table without as many of the columns named in `drop`, in that order, as needed to fit `width`."""
    keep = list(range(len(table.headers)))
    sizes = [max([_width(header), *(_width(row[i]) for row in table.rows)]) for i, header in enumerate(table.headers)]
    for header in drop:
        if sum(sizes[i] + gap for i in keep) <= width:
            break
        keep = [i for i in keep if table.headers[i] != header]
    return _with_columns(table, keep)


def trimmed(table: Table, columns: Sequence[str]) -> Table:
    """Return the table without those of the named columns that are empty in every row."""
    empty = [i for i, header in enumerate(table.headers) if header in columns and not any(r[i] for r in table.rows)]
    return _with_columns(table, [i for i in range(len(table.headers)) if i not in empty])


def _with_columns(table: Table, keep: Sequence[int]) -> Table:
    return replace(
        table,
        headers=tuple(table.headers[i] for i in keep),
        rows=tuple(tuple(row[i] for i in keep) for row in table.rows),
        left=frozenset(new for new, old in enumerate(keep) if old in table.left),
        best=frozenset((row, keep.index(column)) for row, column in table.best if column in keep),
    )


def spans(rounds: list[int]) -> str:
    """Return rounds as a person writes them: 1-4, 7."""
    parts: list[list[int]] = []
    for number in sorted(rounds):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
