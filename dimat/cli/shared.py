"""Flags that several commands share, and the functions with which commands print.

Results go to stdout; messages for a person go to stderr.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, validators

from dimat.errors import DataError
from dimat.json_text import to_json

if TYPE_CHECKING:
    from dimat.ui.terminal.run import ConsoleListener

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print the result as one JSON object on stdout.")]
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
    Parameter(
        validator=AtLeastOne, help="Worker processes; default: one per core. The number does not change results."
    ),
]
Overwrite = Annotated[bool, Parameter(negative="", help="Replace earlier results of the same experiment.")]
Quiet = Annotated[bool, Parameter(negative="", help="Print no progress, only results and warnings.")]


@contextmanager
def collector_paused() -> Generator[None]:
    """Pause the garbage collector while modules are loaded, and let it pass over them afterwards.

    It would scan them repeatedly and find nothing: while torch is loaded that takes a seventh of the CPU time, and
    once more as much as soon as it goes on.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            if not gc.get_freeze_count():  # once a process: what is frozen is never collected
                gc.freeze()
            gc.enable()


def show(value: Any) -> None:
    """Print a result on stdout, plain values as JSON."""
    text = value if isinstance(value, str) else to_json(value)
    try:
        try:
            sys.stdout.write(text + "\n")
        except UnicodeEncodeError:  # a file name that is not valid text, or a terminal without these characters
            encoding = sys.stdout.encoding or "utf-8"
            sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise DataError(f"cannot write the result to stdout: {error.strerror}; see where it leads") from None


def say(text: str) -> None:
    """Print a message for a person on stderr; where nobody can read it, what it is about goes on."""
    with suppress(OSError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def open_console(quiet: bool) -> ConsoleListener:
    """Return the listener that shows a run's progress on stderr."""
    from dimat.ui.terminal.run import ConsoleListener

    return ConsoleListener(sys.stderr, verbosity=-1 if quiet else 0)
