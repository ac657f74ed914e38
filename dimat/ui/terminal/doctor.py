"""Checks of `dimat doctor` as lines and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dimat.agent.doctor.check import Check, exit_code
from dimat.ui.text import clean, count_text

WIDTH = 16


def check_lines(check: Check) -> list[str]:
    """Return a check as a line, and its advice as another."""
    lines = [f"{check.level:<5}{clean(check.name):<{WIDTH}} {clean(check.what)}"]
    if check.mend:
        lines.append(f"{'':<{5 + WIDTH}} → {clean(check.mend)}")
    return lines


def summary(checks: Sequence[Check]) -> str:
    """Return the numbers of faults and warnings."""
    faults = sum(check.level == "fail" for check in checks)
    warnings = sum(check.level == "warn" for check in checks)
    return f"{count_text(faults, 'fault')}, {count_text(warnings, 'warning')}" if faults or warnings else "all is well"


def checks_json(checks: Sequence[Check]) -> dict[str, Any]:
    """Return all checks as one JSON object, with the exit code."""
    return {"findings": [asdict(check) for check in checks], "exit_code": exit_code(checks)}
