"""The findings of `dimat advise` for a person: verdict, table, lines to change, notes."""

from __future__ import annotations

from dimat.advice import Advice, ProbeRow
from dimat.ui.text import Table, as_text, clean, mb_text, metric_text

AS_IT_IS = "nothing to change: the unchanged experiment was as good as everything that was tried"


def advice_lines(advice: Advice) -> list[str]:
    """Return all output for a person, the verdict first."""
    lines = [_verdict(advice), "", *as_text(advice_table(advice)), ""]
    changes = advice.toml()
    lines += ["changes to the experiment:", "", *changes.splitlines()] if changes else [AS_IT_IS]
    lines += ["", f"one probe: {advice.probe}; all of them: {advice.cost}"]
    return [*lines, *(f"note: {clean(note)}" for note in advice.notes)]


def advice_table(advice: Advice) -> Table:
    """Return a row for each variant that was run; those that were kept are marked."""
    rows = [_row(row, advice.rows[i - 1].factor if i else "") for i, row in enumerate(advice.rows)]
    headers = ("factor", "option", f"{clean(advice.metric)}", "gain", "noise", "MB per agent", "")
    note = "gain: over the factor's first option; noise: the difference that a gain must exceed to count"
    return Table("", headers, (*rows, _row(advice.alone, "")), left=frozenset({0, 1, 6}), note=note)


def _verdict(advice: Advice) -> str:
    best, alone = advice.advised.mean, advice.alone.mean
    numbers = f"{clean(advice.metric)} {metric_text(best)} against {metric_text(alone)} in these probes"
    numbers += f"; unchanged {metric_text(advice.given.mean)}"
    by = f"{abs(best - alone):.3f}"
    if advice.ahead is None:
        return f"merging as advised and training alone are {by} apart, less than seeds can tell ({numbers})"
    if advice.ahead:
        return f"merging as advised beat training alone by {by} ({numbers})"
    return f"merging as advised did not beat training alone, it is {by} behind ({numbers})"


def _row(row: ProbeRow, before: str) -> tuple[str, ...]:
    spread = f" ± {row.std:.3f}" if len(row.values) > 1 else ""
    gain = f"{row.gain:+.3f}" if row.gain or row.factor == "alone" else ""
    name = "" if row.factor == before else clean(row.factor)
    noise = f"{row.noise:.3f}" if name else ""
    kept = "kept" if row.kept else ""
    return (name, clean(row.option), metric_text(row.mean) + spread, gain, noise, mb_text(row.mb), kept)
