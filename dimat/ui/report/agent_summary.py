"""The lineage of a real agent's model, from its own ledger and peers' signed manifests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dimat.agent.lineage.compaction import SUMMARY, read_summary
from dimat.agent.lineage.lineage import Lineage, lineage, read_records
from dimat.agent.lineage.manifest_log import peers_records, read_ledger, starts
from dimat.agent.protocol.messages import MergeRecord
from dimat.errors import DataError
from dimat.ui.text import NONE, Table, as_text, clean, metric_text, spans
from dimat.ui.verdict import Verdict

HEADER = ("agent", "round", "contributor", "contributor_round", "part", "weight")


def agent_lineage(folder: Path, agent: str) -> tuple[MergeRecord, Lineage, list[MergeRecord]]:
    """Return an agent's last merge, the contributions to its model since, and all records of its own merges.

    Beyond the agent's own records only its peers' manifests are known: contributions through other agents' merges
    without such a manifest are in `Lineage.earlier`. DataError if there is no merge on record.
    """
    path = folder / "lineage.jsonl"
    own = read_records(path) if path.exists() else []
    if not own:
        raise DataError(f"{folder} has no merge on record yet; the agent writes one at the end of each round")
    vouched = list(read_ledger(folder / "manifests.jsonl"))
    last = max(own, key=lambda record: record.round)
    # of several records of one round the last counts
    last = next(record for record in reversed(own) if record.round == last.round)
    peers = [record for record in peers_records(vouched) if record.agent != agent]
    known = read_summary(folder / SUMMARY)
    return last, lineage([*own, *peers], agent, starts=starts(vouched), known=known), own


def lineage_rows(agent: str, number: int, made: Lineage) -> list[tuple[object, ...]]:
    """Return the rows of `lineage.csv` under `HEADER`.

    `part`: "training", a round of training, with its round; "first", an initial network; "earlier", a model of unknown
    origin, with the round of the merge that used it.
    """
    rows: list[tuple[object, ...]] = []
    rows += [(agent, number, who, of, "training", weight) for (who, of), weight in made.updates.items()]
    rows += [(agent, number, who, 0, "first", weight) for who, weight in made.initial.items()]
    rows += [(agent, number, who, of, "earlier", weight) for (who, of), weight in made.earlier.items()]
    return [row for row in rows if row[-1]]


def report_lines(agent: str, last: MergeRecord, made: Lineage, verdict: Verdict) -> list[str]:
    """Return the output of `dimat report` for an agent: the verdict, its last merge, and a row per contributor."""
    result = last.result
    moves = {peer: f" ({share:.0%} of its units moved)" for peer, share in result.moved.items()}
    parts = ", ".join(f"{clean(p.agent)} {p.weight:.3f}{moves.get(p.agent, '')}" for p in last.contributions)
    metrics = "; ".join(
        f"{name} {metric_text(result.before.get(name))} → {metric_text(value)}" for name, value in result.after.items()
    )
    kept = result.accepted
    outcome = "accepted" if kept == 1 else f"accepted {kept:.0%}" if kept else "rejected"
    lines = [
        verdict.line,
        "",
        f"{clean(agent)} after round {last.round}: {parts}; {outcome}" + (f"; {metrics}" if metrics else ""),
        "",
        *as_text(contributors_table(made)),
    ]
    if made.earlier:
        lines.append("earlier models: neighbours merged them from agents further away, and their origin is not known")
    return lines


def contributors_table(made: Lineage) -> Table:
    """Return a row per contributor to a model: its rounds of training, their share, its initial network, and its models
    of unknown origin."""
    shares = made.shares()
    rounds: defaultdict[str, list[int]] = defaultdict(list)
    for (who, number), weight in made.updates.items():
        if weight > 0:
            rounds[who].append(number)
    earlier: defaultdict[str, float] = defaultdict(float)
    for (who, _), weight in made.earlier.items():
        earlier[who] += weight
    rows = tuple(
        (
            clean(who),
            spans(rounds[who]) or NONE,
            _percent(shares.get(who, 0.0)),
            _percent(made.initial.get(who, 0.0)),
            _percent(earlier[who]),
        )
        for who in sorted({*shares, *made.initial, *earlier})
    )
    headers = ("contributor", "rounds", "% of training", "% first network", "% earlier models")
    return Table("", headers, rows, left=frozenset({0, 1}))


def report_json(agent: str, last: MergeRecord, made: Lineage, verdict: Verdict) -> dict[str, Any]:
    """Return the same as one JSON object, with unrounded weights."""
    return {
        "verdict": verdict.to_plain(),
        "agent": agent,
        "round": last.round,
        "merge": last.to_dict(),
        "shares": made.shares(),
        "first": dict(made.initial),
        "training": [_entry(key, weight) for key, weight in made.updates.items()],
        "earlier": [_entry(key, weight) for key, weight in made.earlier.items()],
    }


def _entry(key: tuple[str, int], weight: float) -> Mapping[str, object]:
    return {"agent": key[0], "round": key[1], "weight": weight}


def _percent(share: float) -> str:
    return "." if share == 0 else f"{100 * share:.1f}" if share >= 0.0005 else "<0.1"
