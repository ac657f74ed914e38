"""Results as tables, for the console, the report and the CSV files alike.

Everything here is pure; `text` formats the numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dimat.events import RoundSummary
from dimat.metrics import lower_is_better, score_of
from dimat.ui.text import (
    NONE,
    Table,
    bytes_text,
    clean,
    count_text,
    distance_text,
    mb_text,
    mean,
    metric_text,
    range_text,
    seconds_text,
    trimmed,
)

if TYPE_CHECKING:
    from dimat.results import AgentRound, Comparison, MethodCurve, Results

MERGES_SHOWN = (1, 2, 3, 5, 10)
MAX_CLASSES = 20
MAX_AGENTS = 16
# the orders in which narrow terminals lose columns
ROUND_DROP = ("bases", "heard", "MB sent", "min–max", "distance", "loss", "before merge", "time", "agents")
FINAL_DROP = ("round", "heard", "MB received", "loss", "samples", "distance", "MB sent", "before merge")
COMPARISON_DROP = ("merge 3", "merge 2", "merge 5", "MB in all", "MB to 90 %", "rounds to 90 %")


# ---- one run


def summarise(results: Results) -> list[RoundSummary]:
    """Return the simulator's summary of each round, computed again from the rows of `results`."""
    from dimat.results import round_summary  # pydantic: not wanted by those who only format events

    by_round: dict[int, list[AgentRound]] = {}
    for row in results.rows:
        by_round.setdefault(row.round, []).append(row)
    planned = _rounds(results)
    rounds = max([planned, *by_round]) if planned else 0
    sent, summaries = 0, list[RoundSummary]()
    for _, rows in sorted(by_round.items()):
        sent += sum(row.bytes_sent for row in rows)
        summaries.append(round_summary(results.run, rows, rounds, sent / 1e6))
    return summaries


def _rounds(results: Results) -> int:
    schedule = results.config.get("schedule")
    planned = schedule.get("rounds") if isinstance(schedule, dict) else None  # pyright: ignore[reportUnknownMemberType]
    return planned if isinstance(planned, int) else 0


ROUND_HEADERS = (
    "round",
    "time",
    "agents",
    "loss",
    "before merge",
    "after merge",
    "min–max",
    "distance",
    "bases",
    "heard",
    "MB sent",
)
ROUND_OPTIONAL = ("time", "agents")
"""Columns that are left out if they are empty in every round."""


def round_text(number: int, rounds: int) -> str:
    """Return e.g. `3/10`, or the number alone of a run without end (`rounds` = 0)."""
    return f"{number}/{rounds}" if rounds else str(number)


def clock_text(time_s: float, rounds: int) -> str:
    """Return the virtual time after a number of rounds, and "" if the clock only counts them: then neither a network
    nor computers nor faults are simulated."""
    return "" if time_s == 0 or math.isclose(time_s, rounds) else seconds_text(time_s)


def round_cells(summary: RoundSummary, agents: str = "") -> tuple[str, ...]:
    """Return the cells of one round under `ROUND_HEADERS`. `agents`: the number that took part, if not all did."""
    return (
        round_text(summary.round, summary.rounds),
        clock_text(summary.time_s, summary.round),
        agents,
        metric_text(summary.loss),
        metric_text(summary.before_mean),
        metric_text(summary.after_mean),
        range_text(summary.after_min, summary.after_max),
        distance_text(summary.consensus_distance),
        str(summary.bases),
        f"{summary.heard}/{summary.expected}",
        mb_text(summary.mb_sent),
    )


def round_line(summary: RoundSummary, metric: str, agents: str = "") -> str:
    """Return one round as one plain line; columns stay aligned from round to round. `agents`: as in `round_cells`."""
    width = len(str(summary.rounds)) if summary.rounds else 3
    number = f"{summary.round:>{width}}"
    clock = clock_text(summary.time_s, summary.round)
    parts = [f"round {number}/{summary.rounds}" if summary.rounds else f"round {number}"]
    parts += [f"at {clock:<7}"] if clock else []
    parts.append(f"loss {metric_text(summary.loss):<5}")
    if summary.after_mean is not None:
        before = "" if summary.before_mean is None else f"{metric_text(summary.before_mean)} -> "
        spread = f"({metric_text(summary.after_min)} to {metric_text(summary.after_max)})"
        parts.append(f"{metric} {before}{metric_text(summary.after_mean)} {spread}")
    parts += [
        f"distance {distance_text(summary.consensus_distance):<7}",
        f"bases {summary.bases}",
        f"heard {summary.heard}/{summary.expected}",
        f"sent {mb_text(summary.mb_sent)} MB",
    ]
    return "  ".join([*parts, f"{agents} agents"] if agents else parts)


def some_of(part: int, total: int) -> str:
    """Return e.g. `14 of 16`, and "" if all take part or the number is not known."""
    return f"{part} of {total}" if 0 < part < total else ""


def round_table(results: Results) -> Table:
    """Return the means over agents, one row per round."""
    took = Counter(row.round for row in results.rows)
    rows = [round_cells(s, some_of(took[s.round], len(results.agents))) for s in summarise(results)]
    note = f"{results.metric} on the test set, mean over agents; MB sent by all agents so far"
    table = trimmed(Table("Rounds", ROUND_HEADERS, tuple(rows), left=frozenset(), note=note), ROUND_OPTIONAL)
    return replace(table, note=f"{note}; virtual time") if "time" in table.headers else table


def final_table(results: Results) -> Table:
    """Return each agent's results: its last round, and its traffic over all rounds; the last row is the mean."""
    own: dict[str, list[AgentRound]] = {}
    for row in results.rows:
        own.setdefault(row.agent, []).append(row)
    last = {agent: max(rows, key=lambda row: row.round) for agent, rows in own.items()}
    cells = [
        (
            clean(agent),
            f"{sum(results.histogram.get(agent, ())):,}",
            str(last[agent].round),
            metric_text(last[agent].loss),
            metric_text(last[agent].before),
            metric_text(last[agent].after),
            distance_text(last[agent].consensus_distance),
            f"{sum(row.heard for row in own[agent])}/{sum(row.expected for row in own[agent])}",
            mb_text(sum(row.bytes_sent for row in own[agent]) / 1e6),
            mb_text(sum(row.bytes_received for row in own[agent]) / 1e6),
        )
        for agent in results.agents
        if agent in own
    ]
    if cells:
        final, count = list(last.values()), len(cells)
        cells.append(
            (
                "mean",
                f"{sum(sum(results.histogram.get(agent, ())) for agent in own) / count:,.0f}",
                "",
                metric_text(mean(row.loss for row in final)),
                metric_text(mean(row.before for row in final)),
                metric_text(mean(row.after for row in final)),
                distance_text(sum(row.consensus_distance for row in final) / count),
                "",
                mb_text(sum(row.bytes_sent for row in results.rows) / count / 1e6),
                mb_text(sum(row.bytes_received for row in results.rows) / count / 1e6),
            )
        )
    headers = ("agent", "samples", "round", "loss", "before merge", "after merge", "distance", "heard", "MB sent")
    note = f"{results.metric} on the test set in the agent's last round; traffic over all rounds"
    title = f"{clean(results.run)} ({clean(results.method)}): agents at the end"
    return Table(title, (*headers, "MB received"), tuple(cells), foot=bool(cells), note=note)


def histogram_table(histogram: Mapping[str, Sequence[int]], classes: Sequence[str] = (), full: bool = False) -> Table:
    """Return each agent's samples by class. With more than `MAX_CLASSES` classes, the number of an agent's classes and
    its largest three replace the counts; with more than `MAX_AGENTS` agents the rest are only counted, unless
    `full`."""
    width = max((len(counts) for counts in histogram.values()), default=0)
    names = [clean(classes[i]) if i < len(classes) else str(i) for i in range(width)]
    shown = list(histogram) if full or len(histogram) <= MAX_AGENTS else list(histogram)[: MAX_AGENTS - 1]
    hidden = len(histogram) - len(shown)
    note = f"and {count_text(hidden, 'more agent')}" if hidden else ""
    if width > MAX_CLASSES:
        rows = tuple(
            (clean(a), f"{sum(histogram[a]):,}", str(sum(1 for n in histogram[a] if n)), _largest(histogram[a], names))
            for a in shown
        )
        return Table("", ("agent", "samples", "classes", "largest"), rows, left=frozenset({0, 3}), note=note)
    rows = tuple((clean(agent), f"{sum(histogram[agent]):,}", *_counts(histogram[agent], width)) for agent in shown)
    return Table("", ("agent", "samples", *names), rows, note=note)


def _counts(counts: Sequence[int], width: int) -> list[str]:
    # a dot for zero: what an agent does not hold is what a reader looks for
    return [(str(counts[i]) if counts[i] else ".") if i < len(counts) else "." for i in range(width)]


def _largest(counts: Sequence[int], names: Sequence[str]) -> str:
    order = sorted(range(len(counts)), key=lambda i: -counts[i])[:3]
    return ", ".join(f"{names[i]}: {counts[i]}" for i in order if counts[i])


def cost_table(results: Results) -> Table:
    """Return bytes and CPU-seconds of the run, over all agents."""
    count = max(len(results.agents), 1)
    sent, received = (sum(getattr(row, key) for row in results.rows) for key in ("bytes_sent", "bytes_received"))
    rows = [
        ("snapshot", bytes_text(results.snapshot_bytes), ""),
        ("sent", bytes_text(sent), bytes_text(sent // count)),
        ("received", bytes_text(received), bytes_text(received // count)),
        *((f"CPU: {clean(k)}", seconds_text(v), seconds_text(v / count)) for k, v in sorted(results.cpu_s.items())),
    ]
    if results.cpu_s:
        total = sum(results.cpu_s.values())
        rows.append(("CPU: all", seconds_text(total), seconds_text(total / count)))
    rows.append(("wall clock", seconds_text(results.wall_s), ""))
    return Table("Cost", ("", "whole run", "per agent"), tuple(rows))


def run_line(method: str, seed: int, agents: int, edges: int, parameters: int, snapshot_bytes: int) -> str:
    """Return a description of the run, on one line."""
    return ", ".join(
        (
            f"method {clean(method)}",
            f"seed {seed}",
            count_text(agents, "agent"),
            count_text(edges, "edge"),
            count_text(parameters, "parameter"),
            f"{bytes_text(snapshot_bytes)} a snapshot",
        )
    )


def flattened(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return a configuration tree as (`train.optimizer.lr`, text) pairs; unset keys are left out."""
    pairs: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            pairs += flattened(value, f"{prefix}{key}.")  # pyright: ignore[reportUnknownArgumentType]
        elif value is not None:
            pairs.append((clean(f"{prefix}{key}"), clean(str(value))))
    return pairs


# ---- several methods side by side


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Return a table per split: a row per method, the metric after some merges, and the cost of getting near the
    ceiling. The ceiling itself is never the best cell, nor are the zero megabytes of a method that never sends."""
    return [_split_table(comparison, split) for split in comparison.splits]


def _split_table(comparison: Comparison, split: str) -> Table:
    curves = comparison.splits[split]
    longest = max((len(curve.after_merge) for curve in curves.values()), default=0)
    merges = sorted({merge for merge in (*MERGES_SHOWN, longest) if 1 <= merge <= longest})
    target, metric = comparison.target(split), comparison.metric
    clock = timed(curves)
    columns: list[list[float | None]] = [  # smaller is better in each, for `_best`
        *(
            [-score_of(metric, c.after_merge[m - 1]) if m <= len(c.after_merge) else None for c in curves.values()]
            for m in merges
        ),
        [None if target is None else c.rounds_to(target, metric) for c in curves.values()],
        *([[None if target is None else c.time_to(target, metric) for c in curves.values()]] if clock else []),
        [None if target is None else (c.mb_to(target, metric) or None) for c in curves.values()],
        [c.mb_sent_per_agent or None for c in curves.values()],
    ]
    contenders = [i for i, method in enumerate(curves) if not is_ceiling(method)]
    senders = [i for i in contenders if columns[-1][i] is not None]
    best = frozenset(
        (row, i)
        for i, column in enumerate(columns, 1)
        for row in _best(column, senders if i == len(columns) else contenders)
    )
    rows = tuple(_method_row(method, curve, merges, target, metric, clock) for method, curve in curves.items())
    seeds = max((len(curve.seeds) for curve in curves.values()), default=0)
    spread = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    ceilings = ", ".join(filter(is_ceiling, curves))
    ceiling = ""
    if target is not None:
        scaled = lower_is_better(metric) == (target < 0)
        share = f"90 % of the ceiling ({ceilings})" if scaled else f"the ceiling's best ({ceilings}) / 0.9"
        ceiling = f"{share} is {metric_text(target)}"
    headers = (
        "method",
        *(f"merge {merge}" for merge in merges),
        "rounds to 90 %",
        *(("time to 90 %",) if clock else ()),
        "MB to 90 %",
        "MB in all",
    )
    note = "; ".join(part for part in (ceiling, "MB sent per agent", "virtual time" if clock else "") if part)
    return Table(
        f"{clean(split)}: {clean(comparison.metric)} after a merge{spread}", headers, rows, best=best, note=note
    )


def is_ceiling(method: str) -> bool:
    """Whether a method is the ceiling for the others."""
    from dimat.config import CEILING  # pydantic: not wanted by those who only format events

    return method == CEILING


def timed(curves: Mapping[str, MethodCurve]) -> bool:
    """Whether virtual time differs from the count of merges for some method."""
    return any(not is_ceiling(name) and not curve.timeline.a_second_a_round for name, curve in curves.items())


def _method_row(
    method: str, curve: MethodCurve, merges: Sequence[int], target: float | None, metric: str, clock: bool
) -> tuple[str, ...]:
    several = len(curve.seeds) > 1 or any(curve.std)
    values = [
        NONE
        if merge > len(curve.after_merge)
        else f"{metric_text(curve.after_merge[merge - 1])}" + (f" ± {curve.std[merge - 1]:.3f}" if several else "")
        for merge in merges
    ]
    rounds = time = mb = None
    if target is not None:
        rounds = curve.rounds_to(target, metric)
        time, mb = curve.time_to(target, metric), curve.mb_to(target, metric)
    reached = NONE if target is None else "never" if rounds is None else str(rounds)
    took = NONE if time is None or is_ceiling(method) else seconds_text(time)
    megabytes = NONE if mb is None else mb_text(mb)
    return (clean(method), *values, reached, *((took,) if clock else ()), megabytes, mb_text(curve.mb_sent_per_agent))


def _best(column: Sequence[float | None], contenders: Sequence[int]) -> list[int]:
    values = [column[i] for i in contenders]
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known or (len(known) == len(values) and min(known) == max(known)):
        return []  # no one is best where all are equal
    return [i for i in contenders if column[i] == min(known)]


def timeline_rows(comparison: Comparison) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    """Return header and rows of `timeline.csv`: the metric of each split and method over time and megabytes."""
    rows: list[tuple[object, ...]] = [
        (split, method, time, mb, value)
        for split, curves in comparison.splits.items()
        for method, curve in curves.items()
        for time, mb, value in zip(curve.timeline.time_s, curve.timeline.mb, curve.timeline.value, strict=True)
    ]
    return ("split", "method", "time_s", "mb_fetched_per_agent", f"{comparison.metric}_mean"), rows


def comparison_rows(comparison: Comparison) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    """Return header and rows of `comparison.csv`: one row per split, method and merge, numbers unrounded."""
    rows: list[tuple[object, ...]] = [
        (split, method, merge, value, deviation, curve.mb_sent_per_agent * merge / len(curve.after_merge))
        for split, curves in comparison.splits.items()
        for method, curve in curves.items()
        for merge, (value, deviation) in enumerate(zip(curve.after_merge, curve.std), 1)
    ]
    return (
        "split",
        "method",
        "merge",
        f"{comparison.metric}_mean",
        f"{comparison.metric}_std",
        "mb_sent_per_agent",
    ), rows
