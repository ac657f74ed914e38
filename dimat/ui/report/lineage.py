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
"""The most agents for which the table is a matrix; with more, it names each one's largest contributors."""
MOST_NAMED = 3
WORK = 1_000_000
"""Most parts of merges that are processed, in a second or two. In larger runs only some agents are computed."""


@dataclass(frozen=True, slots=True)
class Contributions:
    """`agents`: all of the run; `models`: agent → contributions to its final model. `unknown`: agents that ended no
    round, and so left no model; `left_out`: number of others that were not computed."""

    agents: tuple[str, ...]
    models: Mapping[str, Lineage]
    unknown: tuple[str, ...] = ()
    left_out: int = 0

    def note(self) -> str:
        """Return a note about agents without a row."""
        parts: list[str] = []
        if self.unknown:
            parts.append(f"no merge of {listed(self.unknown, 4)} is on record")
        if self.left_out:
            parts.append(f"{count_text(self.left_out, 'more agent')} not computed: the run is large")
        return "; ".join(parts)


def contributions(folder: Path, results: Results) -> Contributions:
    """Compute the contributions to the final models of a run, from its ledger of merges.

    DataError if the ledger is missing, damaged, or lacks a merge in the results.
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
    """Return the rows of `lineage.csv` under `HEADER`: one per model and contributor, numbers unrounded."""
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
    """Return the table of training: the shares of each agent's training in each final model."""
    shares = {agent: model.shares() for agent, model in found.models.items()}
    note = "percent of the training in the final model of each row's agent, by the agent that did it"
    return _table(found.agents, shares, note)


def initial_table(found: Contributions) -> Table:
    """Return the table of initial networks: the shares of each agent's in each final model."""
    initial = {agent: model.initial for agent, model in found.models.items()}
    return _table(
        found.agents, initial, "percent of each agent's initial network in the final model of each row's agent"
    )


def _table(agents: Sequence[str], shares: Mapping[str, Mapping[str, float]], note: str) -> Table:
    """Return rows that each sum up to 100 %: a column per contributor, or the largest ones if there are many."""
    if len(agents) <= MATRIX_AGENTS:
        rows = [(clean(agent), *(_percent(row.get(who, 0.0)) for who in agents)) for agent, row in shares.items()]
        return Table("", ("agent", *map(clean, agents)), tuple(rows), note=note)
    rows = [
        (clean(agent), _percent(row.get(agent, 0.0)), str(sum(1 for x in row.values() if x > 0)), _largest(row, agent))
        for agent, row in shares.items()
    ]
    headers = ("agent", "itself", "contributors", "largest others")
    return Table("", headers, tuple(rows), left=frozenset({0, 3}), note=f"{note}; {MOST_NAMED} largest")


def _largest(row: Mapping[str, float], agent: str) -> str:
    order = sorted((who for who, share in row.items() if share > 0 and who != agent), key=lambda who: -row[who])
    return ", ".join(f"{clean(who)} {_percent(row[who])}" for who in order[:MOST_NAMED]) or NONE


def _percent(share: float) -> str:
    # a dot for nothing at all: who is not in a model is what a reader looks for
    return "." if share == 0 else f"{100 * share:.0f}" if share >= 0.005 else "<1"
