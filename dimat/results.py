"""What a run leaves behind: the schema of `results.json`, written by the simulator and read by the report.

Kept on the lowest floor because both sides need it and must not know each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dimat.errors import DataError
from dimat.events import RoundSummary

FORMAT = 1


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AgentRound(Record):
    """One agent's round. Metrics are on the test set; None where they were not evaluated."""

    round: int
    agent: str
    loss: float | None
    """Mean training loss of the round; None where it had no training."""
    before: float | None
    after: float | None
    heard: int
    expected: int
    bytes_sent: int
    bytes_received: int
    basis: str
    accepted: float
    consensus_distance: float
    """‖θ_agent − θ̄‖₂ / ‖θ̄‖₂ after the merge, over all floating-point tensors."""
    samples: int
    time_s: float
    """Virtual seconds at the end of the round."""


class Results(Record):
    """One run: its configuration, who held what, and a row per agent and round."""

    format: int = FORMAT
    version: str
    run: str
    method: str
    seed: int
    status: str
    """"done", "stopped" (by the user; the rows are those of complete rounds) or "failed"."""
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

    @property
    def mb_sent_per_agent(self) -> float:
        """Megabytes (10⁶ bytes) of snapshots sent per agent over the whole run, the mean over agents."""
        return sum(row.bytes_sent for row in self.rows) / max(len(self.agents), 1) / 1e6


def round_summary(run: str, rows: Sequence[AgentRound], rounds: int, mb_sent: float) -> RoundSummary:
    """Return the line that sums up one complete round of a run of `rounds`, from its agents' rows."""

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
    """Read `results.json` of a run folder; DataError where it is missing, damaged or of another format."""
    file = Path(run_dir) / "results.json"
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"no results in {run_dir}: cannot read {file.name} ({error.strerror})") from error
    try:
        results = Results.model_validate_json(text)
    except ValidationError as error:
        raise DataError(f"{file} is damaged or of another version: {error.errors()[0]['msg']}") from None
    if results.format != FORMAT:
        raise DataError(f"{file} has format {results.format}, this dimat reads {FORMAT}")
    return results


class MethodCurve(Record):
    """One method on one split: test metric after merge 1, 2, …, mean and standard deviation over `seeds` runs
    of the mean over agents. `curves` holds the runs themselves."""

    after_merge: list[float]
    std: list[float]
    mb_sent_per_agent: float
    seeds: list[int] = []
    curves: list[list[float]] = []

    def rounds_to(self, target: float) -> int | None:
        """Return the first merge after which the mean metric is at least `target`; None if it never is."""
        return next((i for i, value in enumerate(self.after_merge, 1) if value >= target), None)

    def mb_to(self, target: float) -> float | None:
        """Return the megabytes sent per agent until `target` is reached; None if it never is."""
        rounds = self.rounds_to(target)
        return None if rounds is None else self.mb_sent_per_agent * rounds / len(self.after_merge)


class Comparison(Record):
    """Methods side by side: `splits[split][method]`. "centralised", where present, is the ceiling."""

    metric: str
    splits: dict[str, dict[str, MethodCurve]]

    def target(self, split: str, share: float = 0.9) -> float | None:
        """Return `share` of the ceiling's best mean metric; None where the ceiling was not run."""
        ceiling = self.splits[split].get("centralised")
        return share * max(ceiling.after_merge) if ceiling is not None and ceiling.after_merge else None

    def to_plain(self) -> dict[str, dict[str, dict[str, object]]]:
        """Return {split: {method: {"after_merge", "std", "mb_sent_per_agent"}}}: the form of `demo --json`."""
        wanted = {"after_merge", "std", "mb_sent_per_agent"}
        return {s: {m: curve.model_dump(include=wanted) for m, curve in c.items()} for s, c in self.splits.items()}
