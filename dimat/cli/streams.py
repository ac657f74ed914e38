"""The standard streams as a process gets them: some may be closed, or end in a full disk."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dimat.errors import DataError


def open_closed_streams() -> None:
    """Put the null device wherever a standard stream is closed.

    Otherwise a file or socket opened later gets the stream's number, and what is printed goes into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            os.set_inheritable(number, True)
            stream = os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8")
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def check_working_folder() -> None:
    """Raise where the folder that the command is run in has been removed."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise DataError(
            "the folder that this runs in has been removed; change to another folder, then try again"
        ) from None
