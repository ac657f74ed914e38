"""Shared by commands: flags that several have, and where they print.

Results go to stdout, everything for a person to stderr.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, validators

from dimat.json_text import to_json

if TYPE_CHECKING:
    from dimat.ui.terminal.run import ConsoleListener

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON object on stdout.")]
Overrides = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set",
        negative="",
        consume_multiple=False,
        help="Set a key of the experiment, e.g. --set train.optimizer.lr=0.01. Repeatable.",
    ),
]
Out = Annotated[Path | None, Parameter(help="Folder for results.")]
AtLeastOne = validators.Number(gte=1, lt=2**62)
SeedRange = validators.Number(gte=0, lt=2**63)
Workers = Annotated[
    int | None,
    Parameter(validator=AtLeastOne, help="Worker processes; default: one per core. Results do not depend on it."),
]
Overwrite = Annotated[bool, Parameter(negative="", help="Replace results of the same experiment.")]
Quiet = Annotated[bool, Parameter(negative="", help="No progress, only results and warnings.")]


@contextmanager
def collector_paused() -> Generator[None]:
    """Load modules inside without the garbage collector, which would look through them again and again for nothing: a
    seventh of the CPU time of loading torch."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def show(value: Any) -> None:
    """Print a result on stdout, plain values as JSON."""
    text = value if isinstance(value, str) else to_json(value)
    try:
        sys.stdout.write(text + "\n")
    except UnicodeEncodeError:  # a name from the disk that is no text, or a terminal that has no such characters
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def say(text: str) -> None:
    """Tell a person something, on stderr."""
    sys.stderr.write(text + "\n")


def open_console(quiet: bool) -> ConsoleListener:
    """Return the listener that shows a run's progress on stderr."""
    from dimat.ui.terminal.run import ConsoleListener

    return ConsoleListener(sys.stderr, verbosity=-1 if quiet else 0)
