"""The first line of every report: whether merging beat training alone, and what to try next.

Training alone is a row `isolated` of the same comparison, with the same parts, seeds and training. Without it, only the
changes by the merges themselves are known, and the line says so. Metrics are on the task's test set; which way one is
better is told by its name (`dimat.metrics`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dimat.metrics import score_of
from dimat.ui.text import clean, count_text, metric_text

if TYPE_CHECKING:
    from dimat.agent.protocol.messages import MergeRecord
    from dimat.results import Comparison, MethodCurve, Results


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a run about merging against training alone.

    `ahead`: whether merging was ahead at the end by more than seeds differ, None if that was not measured or is
    unclear; `by`: the difference of the metric after the last merge, merged − alone; `from_merge`: the first merge from
    which on it was ahead; `next_step`: what to try, or the command that would measure it.
    """

    what: str
    text: str
    ahead: bool | None = None
    by: float | None = None
    from_merge: int | None = None
    next_step: str = ""

    @property
    def line(self) -> str:
        """The verdict as one line."""
        text = f"{self.text}; next: {self.next_step}" if self.next_step else self.text
        return clean(f"{self.what}: {text}" if self.what else text)

    def to_plain(self) -> dict[str, Any]:
        """Return plain values, with the line itself."""
        return {**asdict(self), "line": self.line}


# ---- several methods side by side


def of_comparison(comparison: Comparison) -> dict[str, list[Verdict]]:
    """Return by split the verdict on each row that merges, the best first; a single one for a split without
    `isolated`."""
    from dimat.config import FLOOR  # pydantic: not wanted by those who only format events

    found: dict[str, list[Verdict]] = {}
    for split, curves in comparison.splits.items():
        floor = curves.get(FLOOR)
        merging = {name: curve for name, curve in curves.items() if curve.mb_sent_per_agent > 0 and curve.after_merge}
        if merging and (floor is None or not floor.after_merge):
            text = "whether merging beat training alone was not measured: no row trains alone"
            found[split] = [Verdict("", text, next_step=_compared(next(iter(merging))))]
        elif merging and floor is not None:
            rows = [_against(name, curve, floor, comparison.metric) for name, curve in merging.items()]
            worth = {row: -score_of(comparison.metric, row.by or 0.0) for row in rows}
            found[split] = sorted(rows, key=lambda row: (row.by is None, worth[row]))
    return found


def headlines(comparison: Comparison) -> list[str]:
    """Return the lines above a comparison's tables: for each split its best row, and the others in short."""
    lines: list[str] = []
    for split, (best, *others) in of_comparison(comparison).items():
        lines.append(f"{clean(split)}: {best.line}")
        if others:
            lines.append(f"{clean(split)}, other rows against training alone: {', '.join(map(_short, others))}")
    return lines


def _short(verdict: Verdict) -> str:
    if verdict.by is None:
        return f"{clean(verdict.what)} trained differently"
    told = {True: "", False: " (behind)", None: " (cannot be told apart)"}[verdict.ahead]
    return f"{clean(verdict.what)} {verdict.by:+.3f}{told}"


def _against(what: str, curve: MethodCurve, floor: MethodCurve, metric: str) -> Verdict:
    own, alone = curve.after_merge[-1], floor.after_merge[-1]
    if curve.unlike:
        text = (
            f"{metric} {metric_text(own)} against {metric_text(alone)} of training alone, which is not a fair "
            f"comparison: the rows differ in {', '.join(curve.unlike)}"
        )
        return Verdict(what, text, next_step="give `isolated` the same training, and compare again")
    # the same seeds, parts and training: differences are taken seed by seed
    paired = _paired(curve, floor)
    pairs = paired or [(curve.after_merge, floor.after_merge)]  # of older comparisons only the means are known
    last = [one[-1] - other[-1] for one, other in pairs]
    by = sum(last) / len(last)
    own, alone = (sum(ends) / len(ends) for ends in zip(*((one[-1], other[-1]) for one, other in pairs), strict=True))
    spread = (sum((d - by) ** 2 for d in last) / (len(last) - 1)) ** 0.5 if len(last) > 1 else None
    ahead = _decided(score_of(metric, by), spread)
    count = len(last) if paired else max(len(curve.seeds), 1)
    seen = count_text(count, "seed") + ("" if spread is None else f", ± {spread:.3f}")
    numbers = f"{metric} {metric_text(own)} against {metric_text(alone)} after merge {len(curve.after_merge)}; {seen}"
    since = _ahead_since(pairs, metric) if score_of(metric, by) > 0 else None
    if ahead:
        came = "ahead at every merge" if since == 1 else f"ahead from merge {since} on" if since else ""
        text = f"merging beat training alone by {abs(by):.3f} ({numbers})" + (f", {came}" if came else "")
        return Verdict(what, text, True, by, since)
    if ahead is None:
        less = "one seed can tell" if spread is None else "seeds differ by"
        text = f"merging and training alone are {abs(by):.3f} apart, less than {less} ({numbers})"
    else:
        text = f"merging did not beat training alone, it is {abs(by):.3f} behind ({numbers})"
    return Verdict(what, text, ahead, by, since, curve.next_step)


def _paired(curve: MethodCurve, floor: MethodCurve) -> list[tuple[Sequence[float], Sequence[float]]]:
    own, other = (dict(zip(each.seeds, each.curves, strict=False)) for each in (curve, floor))
    return [(own[seed], other[seed]) for seed in own if own[seed] and other.get(seed)]


def _decided(by: float, spread: float | None) -> bool | None:
    """Return whether a mean difference is above zero by more than seeds differ, None if that is unclear."""
    from dimat.results import ONE_SEED  # pydantic: not wanted by those who only format events

    return None if abs(by) <= (ONE_SEED if spread is None else spread) else by > 0


def _ahead_since(pairs: Sequence[tuple[Sequence[float], Sequence[float]]], metric: str) -> int | None:
    """Return the first merge from which on merged curves were ahead, in the mean over seeds; None if their merges do
    not match."""
    if len({len(curve) for pair in pairs for curve in pair}) != 1:
        return None
    gaps = [sum(one[i] - other[i] for one, other in pairs) / len(pairs) for i in range(len(pairs[0][0]))]
    behind = [i for i, gap in enumerate(gaps, 1) if score_of(metric, gap) <= 0]
    return None if behind and behind[-1] == len(gaps) else (behind[-1] if behind else 0) + 1


# ---- one run


def of_run(results: Results) -> Verdict:
    """Return the verdict on one simulated run, which has no row that trains alone beside it."""
    from dimat.config import PRESETS

    preset = PRESETS.get(results.method)
    if preset is not None and not preset.exchanges:
        return Verdict("", f'nothing is merged by "{results.method}": this run is not a test of merging')
    gains: dict[int, list[float]] = {}
    pending: dict[str, tuple[int, float]] = {}
    for row in sorted(results.rows, key=lambda row: row.round):
        if row.before is not None:  # of several mixing steps, before the first and after the last
            pending[row.agent] = (row.round, row.before)
        if row.after is not None and row.agent in pending:
            number, before = pending.pop(row.agent)
            gains.setdefault(number, []).append(row.after - before)
    means = {number: sum(each) / len(each) for number, each in gains.items()}
    of = f"test {results.metric}, mean over agents"
    return _unmeasured(list(means.values()), means.get(1), of, _compared(results.method))


def of_agent(records: Sequence[MergeRecord], metric: str = "") -> Verdict:
    """Return the verdict on an agent's own merges: their changes, and the number that its hold-out rejected.

    `metric`: the entry of the records that counts; by default their first except `loss`.
    """
    last = {record.round: record for record in records if record.kind == "merge"}
    merges = [record for _, record in sorted(last.items()) if len(record.contributions) > 1]
    if not merges:
        return Verdict("", "nothing was merged yet: no peer's weights are in this agent's records")
    name = metric or next((key for record in merges for key in record.result.after if key != "loss"), "")
    gains = [
        (record, record.result.after[name] - record.result.before[name])
        for record in merges
        if name in record.result.after and name in record.result.before
    ]
    first = next((gain for record, gain in gains if record.round == 1), None)
    refused = sum(record.result.accepted == 0 for record in merges)
    found = _unmeasured(
        [gain for _, gain in gains],
        first,
        f"this agent's {name or 'metric'}",
        "a simulation of all agents on one machine can tell: " + _compared("dimat", file="agents.toml"),
        missing="agent.evaluate",
    )
    if not refused:
        return found
    return Verdict(
        "", f"{found.text}; its hold-out rejected {refused} of {len(merges)} merges", next_step=found.next_step
    )


def _unmeasured(
    gains: Sequence[float], first: float | None, of: str, command: str, missing: str = "simulate.evaluate"
) -> Verdict:
    """Return the verdict without a row that trains alone: the changes by the merges themselves."""
    text = "whether merging beat training alone was not measured"
    if not gains:
        why = f'{missing} = "all" also measures metrics before merges'
        return Verdict("", f"{text}, nor what merges changed ({why})", next_step=command)
    mean = sum(gains) / len(gains)
    text += f"; {count_text(len(gains), 'merge')} changed {of}, by {mean:+.3f} each"
    if first is not None:
        # until then everybody has trained alone: this one difference is against training alone, in this run
        text += f", the first, before which all had trained alone, by {first:+.3f}"
    return Verdict("", text, next_step=command)


def _compared(method: str, file: str = "experiment.toml") -> str:
    from dimat.config import FLOOR

    return f"dimat simulate {file} --compare {FLOOR},{method} --seeds 3"
