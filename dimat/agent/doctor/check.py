"""One check of `dimat doctor`: its level, its result, and advice for a fault."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dimat.errors import DimatError

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    `name`: its subject; `what`: the state found; `mend`: advice, "" if none is needed; `code`: exit code of a
    command that fails for it (see `dimat.errors`).
    """

    name: str
    level: Level
    what: str
    mend: str = ""
    code: int = 0


def ok(name: str, what: str) -> Check:
    """Return a check that has passed."""
    return Check(name, "ok", what)


def warn(name: str, what: str, mend: str) -> Check:
    """Return a check whose subject may become a fault."""
    return Check(name, "warn", what, mend)


def fail(name: str, what: str, mend: str, kind: type[DimatError]) -> Check:
    """Return a check whose subject keeps the agent from working; `kind` gives the exit code."""
    return Check(name, "fail", what, mend, kind.exit_code)


def failed(name: str, error: DimatError, mend: str = "") -> Check:
    """Return the failed check of an error, whose text ends with the advice, after the last semicolon."""
    what, _, advice = str(error).rpartition("; ")
    if mend or not what:
        return Check(name, "fail", str(error), mend, error.exit_code)
    return Check(name, "fail", what, advice, error.exit_code)


def exit_code(checks: Iterable[Check]) -> int:
    """Return the exit code of the first fault, 0 where there is none."""
    return next((check.code for check in checks if check.level == "fail"), 0)
