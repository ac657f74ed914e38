"""The schema of `results.json`, written by the simulator and read by the report.

The module is on the lowest floor because both sides need it and must not import each other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import groupby
from math import nan
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from dimat.config.presets import CEILING
from dimat.errors import DataError
from dimat.events import RoundFinished, RoundSummary
from dimat.metrics import best_of, score_of, within
from dimat.reading import read_table

FORMAT = 1
ONE_SEED = 0.02
"""Smallest difference that one seed can tell: measured standard deviations over seeds were .01 to .03
(docs/results.md)."""


class ResultsModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AgentRound(ResultsModel):
    """One agent's round. Metrics are on the test set; None where they were not evaluated."""

    round: int
    agent: str
    loss: float | None
    """Mean training loss of the round; None if the round had no training."""
    before: float | None
    after: float | None
    heard: int
    expected: int
    bytes_sent: int
    bytes_received: int
    basis: str
    accepted: float
    consensus_distance: Annotated[float, BeforeValidator(lambda value: nan if value is None else value)]
    """‖θ_agent − θ̄‖₂ / ‖θ̄‖₂ after the merge, over all floating-point tensors."""
    samples: int
    time_s: float
    """Virtual seconds at the end of the round."""
    push_weight: float | None = None
    """Push-sum weight after the merge, if the mixing keeps one."""

    @classmethod
    def of(cls, finished: RoundFinished, metric: str) -> AgentRound:
        """Return the row of a finished round; the consensus distance is filled in once all agents have finished it."""
        return cls(
            before=finished.before.get(metric),
            after=finished.after.get(metric),
            consensus_distance=0.0,
            **{name: getattr(finished, name) for name in cls.model_fields if name not in _DERIVED},
        )


_DERIVED = ("before", "after", "consensus_distance")
"""Fields of a row that are not copied from `RoundFinished`."""


class Timeline(ResultsModel):
    """A metric over virtual time and over traffic.

    From `time_s[i]` on the metric is `value[i]`, the mean over agents of their newest merged models, and an agent has
    fetched `mb[i]` megabytes (10⁶ bytes) on average.
    """

    time_s: list[float] = []
    mb: list[float] = []
    value: list[float] = []

    def reaches(self, target: float, metric: str) -> int | None:
        """Return the first index at which `metric` is as good as `target`; None if it never is."""
        return _first(self.value, target, metric)

    @property
    def a_second_a_round(self) -> bool:
        """Whether merge number n ends at second n, so that time tells no more than the number."""
        return all(abs(time - number) < 1e-6 for number, time in enumerate(self.time_s, 1))


class Results(ResultsModel):
    """One run: its configuration, the agents' data, and a row per agent and round."""

    format: int = FORMAT
    version: str
    run: str
    method: str
    seed: int
    status: str
    """"done", "stopped" (by the user; rows of complete rounds only) or "failed"."""
    config: dict[str, Any]
    agents: list[str]
    edges: list[tuple[str, str]]
    metric: str
    classes: list[str]
    histogram: dict[str, list[int]]
    parameters: int
    snapshot_bytes: int
    rows: list[AgentRound]
    warnings: list[str] = []
    wall_s: float = 0.0
    cpu_s: dict[str, float] = {}
    """CPU-seconds by activity ("train", "publish", "merge", "evaluate", "checkpoint"), over all agents and rounds."""

    def after_merge(self) -> list[float]:
        """Return the mean test metric over agents after merge 1, 2, …; rounds without a metric are left out."""
        means: list[float] = []
        for number in sorted({row.round for row in self.rows}):
            values = [row.after for row in self.rows if row.round == number and row.after is not None]
            if values:
                means.append(sum(values) / len(values))
        return means

    def timeline(self) -> Timeline:
        """Return the metric over virtual time; an agent counts from its first merge on, with what it fetched."""
        newest: dict[str, float] = {}
        total = fetched = 0.0
        points: list[tuple[float, float, float]] = []
        rows = sorted(self.rows, key=lambda row: row.time_s)
        for time_s, together in groupby(rows, key=lambda row: row.time_s):
            for row in together:
                fetched += row.bytes_received
                if row.after is not None:
                    total += row.after - newest.get(row.agent, 0.0)
                    newest[row.agent] = row.after
            if newest:
                points.append((time_s, fetched / max(len(self.agents), 1) / 1e6, total / len(newest)))
        return _timeline(points)

    @property
    def mb_sent_per_agent(self) -> float:
        """Megabytes (10⁶ bytes) of snapshots sent per agent over the whole run, the mean over agents."""
        return sum(row.bytes_sent for row in self.rows) / max(len(self.agents), 1) / 1e6


def round_summary(run: str, rows: Sequence[AgentRound], rounds: int, mb_sent: float) -> RoundSummary:
    """Return the summary of one complete round of a run of `rounds`, from its agents' rows."""

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    after = [row.after for row in rows if row.after is not None]
    return RoundSummary(
        run=run,
        time_s=max(row.time_s for row in rows),
        round=rows[0].round,
        rounds=rounds,
        loss=mean([row.loss for row in rows if row.loss is not None]),
        before_mean=mean([row.before for row in rows if row.before is not None]),
        after_mean=mean(after),
        after_min=min(after, default=None),
        after_max=max(after, default=None),
        consensus_distance=sum(row.consensus_distance for row in rows) / len(rows),
        bases=len({row.basis for row in rows}),
        heard=sum(row.heard for row in rows),
        expected=sum(row.expected for row in rows),
        mb_sent=mb_sent,
    )


def read_results(run_dir: str | Path) -> Results:
    """Read `results.json` of a run folder; DataError if it is missing, damaged or of another format."""
    file = Path(run_dir) / "results.json"
    if not file.exists():
        raise DataError(f"no results in {run_dir}: it has no {file.name}; give the folder of a finished run")
    try:
        results = Results.model_validate(read_table(file))
    except ValidationError as error:
        raise DataError(f"{file} is damaged or of another version: {error.errors()[0]['msg']}") from None
    if results.format != FORMAT:
        raise DataError(f"{file} has format {results.format}, but this version of dimat reads format {FORMAT}")
    return results


def _first(values: Sequence[float], target: float, metric: str) -> int | None:
    bar = score_of(metric, target)
    return next((i for i, value in enumerate(values) if score_of(metric, value) >= bar), None)


def mean_timeline(runs: Sequence[Timeline]) -> Timeline:
    """Return the mean of several runs' timelines, from the time at which all have begun."""
    times = sorted({time for run in runs for time in run.time_s})
    begun = max((run.time_s[0] for run in runs if run.time_s), default=0.0)
    points: list[tuple[float, float, float]] = []
    for time in times if all(run.time_s for run in runs) else ():
        if time >= begun:
            at = [bisect_right(run.time_s, time) - 1 for run in runs]
            mb = sum(run.mb[i] for run, i in zip(runs, at, strict=True)) / len(runs)
            value = sum(run.value[i] for run, i in zip(runs, at, strict=True)) / len(runs)
            points.append((time, mb, value))
    return _timeline(points)


def _timeline(points: Sequence[tuple[float, float, float]]) -> Timeline:
    return Timeline(time_s=[p[0] for p in points], mb=[p[1] for p in points], value=[p[2] for p in points])


class MethodCurve(ResultsModel):
    """One method on one split: test metric after merge 1, 2, …, mean and standard deviation over `seeds` runs
    of the mean over agents; `timeline` is their mean. `curves` holds the runs themselves."""

    after_merge: list[float]
    std: list[float]
    mb_sent_per_agent: float
    seeds: list[int] = []
    curves: list[list[float]] = []
    timeline: Timeline = Timeline()
    unlike: list[str] = []
    """Settings of training in which these runs differ from the runs of `isolated` in the same comparison."""
    next_step: str = ""
    """Advice on the next step, if this method is not ahead of training alone."""

    def rounds_to(self, target: float, metric: str) -> int | None:
        """Return the first merge after which the mean of `metric` is as good as `target`; None if it never is."""
        place = _first(self.after_merge, target, metric)
        return None if place is None else place + 1

    def time_to(self, target: float, metric: str) -> float | None:
        """Return the virtual seconds until `target` is reached; None if it never is."""
        place = self.timeline.reaches(target, metric)
        return None if place is None else self.timeline.time_s[place]

    def mb_to(self, target: float, metric: str) -> float | None:
        """Return the megabytes fetched per agent until `target` is reached; None if it never is."""
        place = self.timeline.reaches(target, metric)
        return None if place is None else self.timeline.mb[place]


class Comparison(ResultsModel):
    """Methods side by side: `splits[split][method]`. The method "centralised", if present, is the ceiling."""

    metric: str
    splits: dict[str, dict[str, MethodCurve]]

    def target(self, split: str, share: float = 0.9) -> float | None:
        """Return `share` of the ceiling's best mean metric (`dimat.metrics.within`); None if the ceiling was not
        run."""
        ceiling = self.splits[split].get(CEILING)
        if ceiling is None or not ceiling.after_merge:
            return None
        return within(self.metric, best_of(self.metric, ceiling.after_merge), share)

    def to_plain(self) -> dict[str, dict[str, dict[str, object]]]:
        """Return {split: {method: {"after_merge", "std", "mb_sent_per_agent"}}}: the form of `demo --json`."""
        wanted = {"after_merge", "std", "mb_sent_per_agent"}
        return {s: {m: curve.model_dump(include=wanted) for m, curve in c.items()} for s, c in self.splits.items()}
