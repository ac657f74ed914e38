"""Contributions to the agents' final models: a table, and rows for `lineage.csv`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dimat.agent.lineage.lineage import Lineage, lineage, read_records
from dimat.errors import DataError
from dimat.results import Results
from dimat.ui.text import NONE, Table, clean, count_text, listed

LEDGER = "lineage.jsonl"
HEADER = ("agent", "contributor", "initial_weight", "share_of_training", "rounds_contributed")
MATRIX_AGENTS = 24
"""The most agents for which the table is a matrix; with more it names each one's largest contributors."""
MOST_NAMED = 3
WORK = 1_000_000
"""Parts of merges that are gone through: a second or two. Runs with more are worked out for some agents only."""


@dataclass(frozen=True, slots=True)
class Contributions:
    """`agents`: all of the run; `models`: agent → what its final model is made of. `unknown`: agents that ended no
    round, and so left no model; `left_out`: how many others were not worked out."""

    agents: tuple[str, ...]
    models: Mapping[str, Lineage]
    unknown: tuple[str, ...] = ()
    left_out: int = 0

    def note(self) -> str:
        """Return what there is to say of agents that have no row."""
        parts: list[str] = []
        if self.unknown:
            parts.append(f"no merge of {listed(self.unknown, 4)} is on record")
        if self.left_out:
            parts.append(f"{count_text(self.left_out, 'more agent')} not worked out: the run is large")
        return "; ".join(parts)


def contributions(folder: Path, results: Results) -> Contributions:
    """Work out what the final models of a run are made of, from its ledger of merges.

    DataError if the ledger is missing, damaged, or lacks a merge of the results.
    """
    if not (folder / LEDGER).exists():  # said without its path: reports of equal runs are equal
        raise DataError(f"the run folder has no {LEDGER}")
    records = read_records(folder / LEDGER)
    last = {row.agent: row.round for row in sorted(results.rows, key=lambda row: row.round)}
    known = [agent for agent in results.agents if agent in last]
    affordable = max(WORK // max(sum(len(record.contributions) for record in records), 1), 1)
    models = {agent: lineage(records, agent, last[agent]) for agent in known[:affordable]}
    unknown = tuple(agent for agent in results.agents if agent not in last)
    return Contributions(tuple(results.agents), models, unknown, len(known) - len(models))


def lineage_rows(found: Contributions) -> list[tuple[object, ...]]:
    """Return the rows of `lineage.csv` under `HEADER`: one per model and agent that is in it, numbers unrounded."""
    rows: list[tuple[object, ...]] = []
    for agent, model in found.models.items():
        shares = model.shares()
        rounds = Counter(who for (who, _), weight in model.updates.items() if weight > 0)
        rows += [
            (agent, who, model.initial.get(who, 0.0), shares.get(who, 0.0), rounds[who])
            for who in found.agents
            if who in model.initial or who in shares
        ]
    return rows


def training_table(found: Contributions) -> Table:
    """Return whose training is in whose final model."""
    shares = {agent: model.shares() for agent, model in found.models.items()}
    note = "percent of the training in the final model of each row's agent, by whose training it was"
    return _table(found.agents, shares, note)


def initial_table(found: Contributions) -> Table:
    """Return of whose first networks the final models are made."""
    initial = {agent: model.initial for agent, model in found.models.items()}
    return _table(found.agents, initial, "percent of each agent's first network in the final model of each row's agent")


def _table(agents: Sequence[str], shares: Mapping[str, Mapping[str, float]], note: str) -> Table:
    """Return rows that each sum up to 100 %: a column per contributor, or the largest ones where there are many."""
    if len(agents) <= MATRIX_AGENTS:
        rows = [(clean(agent), *(_percent(row.get(who, 0.0)) for who in agents)) for agent, row in shares.items()]
        return Table("", ("agent", *map(clean, agents)), tuple(rows), note=note)
    rows = [
        (clean(agent), _percent(row.get(agent, 0.0)), str(sum(1 for x in row.values() if x > 0)), _largest(row, agent))
        for agent, row in shares.items()
    ]
    headers = ("agent", "of itself", "agents in it", "most of others")
    return Table("", headers, tuple(rows), left=frozenset({0, 3}), note=f"{note}; {MOST_NAMED} largest")


def _largest(row: Mapping[str, float], agent: str) -> str:
    order = sorted((who for who, share in row.items() if share > 0 and who != agent), key=lambda who: -row[who])
    return ", ".join(f"{clean(who)} {_percent(row[who])}" for who in order[:MOST_NAMED]) or NONE


def _percent(share: float) -> str:
    # a dot for nothing at all: who is not in a model is what a reader looks for
    return "." if share == 0 else f"{100 * share:.0f}" if share >= 0.005 else "<1"
