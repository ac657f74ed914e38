"""Findings of `dimat doctor` as lines and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dimat.agent.doctor.check import Check, exit_code
from dimat.ui.text import clean, count_text

WIDTH = 16


def finding_lines(finding: Check) -> list[str]:
    """Return a finding as a line, and how to mend it as another."""
    lines = [f"{finding.level:<5}{clean(finding.name):<{WIDTH}} {clean(finding.what)}"]
    if finding.mend:
        lines.append(f"{'':<{5 + WIDTH}} → {clean(finding.mend)}")
    return lines


def summary(findings: Sequence[Check]) -> str:
    """Return how many faults and warnings there are."""
    faults = sum(finding.level == "fail" for finding in findings)
    warnings = sum(finding.level == "warn" for finding in findings)
    return f"{count_text(faults, 'fault')}, {count_text(warnings, 'warning')}" if faults or warnings else "all is well"


def findings_json(findings: Sequence[Check]) -> dict[str, Any]:
    """Return all findings as one JSON object, with the exit code."""
    return {"findings": [asdict(finding) for finding in findings], "exit_code": exit_code(findings)}
