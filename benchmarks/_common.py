"""What all benchmarks share: their options, their table, and their last line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

CACHE = Path(__file__).parent / "cache"
DATA = Path(__file__).parent.parent.parent / "shared" / "data"


@dataclass(frozen=True)
class Result:
    """The outcome of a benchmark: `ratio` is measured / reference; `met`: whether it meets `target`."""

    name: str
    measured: float
    reference: float
    ratio: float
    target: str
    met: bool


def options(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a smaller form that takes under a minute")
    return parser


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table, first column left, the others right."""
    text = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(headers), *text]) for i in range(len(headers))]
    for row in [list(headers), *text]:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))


def finish(result: Result) -> None:
    """Print the last line of a benchmark."""
    print("RESULT " + json.dumps(asdict(result)))
