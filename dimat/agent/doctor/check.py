"""What `dimat doctor` finds: one line each, with how to mend it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dimat.errors import DimatError

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. `name`: what; `what`: how it is; `mend`: what to do, "" where nothing is;
    `code`: exit code of a command that fails for it (see `dimat.errors`)."""

    name: str
    level: Level
    what: str
    mend: str = ""
    code: int = 0


def ok(name: str, what: str) -> Check:
    """Return that something is as it should be."""
    return Check(name, "ok", what)


def warn(name: str, what: str, mend: str) -> Check:
    """Return that something may become a fault."""
    return Check(name, "warn", what, mend)


def fail(name: str, what: str, mend: str, kind: type[DimatError]) -> Check:
    """Return that an agent cannot work like this."""
    return Check(name, "fail", what, mend, kind.exit_code)


def failed(name: str, error: DimatError, mend: str = "") -> Check:
    """Return what an error says; its text ends with what to do, after the last semicolon."""
    what, _, advice = str(error).rpartition("; ")
    if mend or not what:
        return Check(name, "fail", str(error), mend, error.exit_code)
    return Check(name, "fail", what, advice, error.exit_code)


def exit_code(findings: Iterable[Check]) -> int:
    """Return the exit code of the first fault, 0 where there is none."""
    return next((finding.code for finding in findings if finding.level == "fail"), 0)
