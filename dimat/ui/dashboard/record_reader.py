"""Reads the ledgers of merges: contributors to a model, and shares of moved units.

Reading a ledger takes up to seconds in large runs: it is done on request, and the result kept until the ledger changes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dimat.agent.lineage.compaction import SUMMARY
from dimat.agent.lineage.lineage import Lineage, lineage, read_records
from dimat.agent.protocol.messages import MergeRecord
from dimat.errors import DataError
from dimat.ui.dashboard.field_values import number, shares
from dimat.ui.text import spans

LEDGER = "lineage.jsonl"
MOST_ROWS = 600
MOST_UPDATES = 3_000


class RecordReader:
    """Ledgers as last read, by file."""

    def __init__(self) -> None:
        self._kept: dict[Path, tuple[tuple[int, int], list[MergeRecord]]] = {}

    def read(self, folder: Path) -> list[MergeRecord]:
        """Return a folder's records; DataError if its ledger cannot be read, none if it has none."""
        path = folder / LEDGER
        try:
            found = path.stat()
        except OSError:
            return []
        stamp = (found.st_mtime_ns, found.st_size)
        kept = self._kept.get(path)
        if kept is None or kept[0] != stamp:
            kept = self._kept[path] = (stamp, read_records(path))
        return kept[1]

    def lineage(self, agent: str, own: Path, folders: Sequence[Path]) -> dict[str, Any]:
        """Return the contributions to an agent's model. `own`: the folder with its ledger; `folders`: all folders.
        DataError if they are not on record."""
        records = [record for folder in dict.fromkeys([own, *folders]) for record in self.read(folder)]
        mine = [record for record in records if record.agent == agent]
        if not mine:
            raise DataError(f"no merge of {agent} is on record yet")
        last = max(mine, key=lambda record: record.round)
        known = {record.agent for record in records}
        whole = not any((folder / SUMMARY).exists() for folder in (own, *folders))
        if whole and all(part.agent in known for record in records for part in record.contributions):
            made = lineage(records, agent, last.round)
        else:  # of others only what their signed manifests say
            from dimat.ui.report.agent_summary import agent_lineage

            last, made, _ = agent_lineage(own, agent)
        return {"agent": agent, "round": last.round, **_contributors(made)}

    def moves(self, agents: Sequence[str], folders: Sequence[Path]) -> list[dict[str, Any]]:
        """Return the share of a peer's units that moved, for each merge and each peer aligned for it.

        The shares are in total and by group of units, if the ledger has them.
        """
        rows: list[dict[str, Any]] = []
        for folder in folders:
            for record in self.read(folder):
                if agents and record.agent not in agents:
                    continue
                rows += [
                    {
                        "agent": record.agent,
                        "round": record.round,
                        "peer": peer,
                        "moved": number(moved),
                        "groups": shares(record.result.moved_groups.get(peer)),
                    }
                    for peer, moved in record.result.moved.items()
                ]
        rows.sort(key=lambda row: (-row["round"], row["agent"], row["peer"]))
        return rows[:MOST_ROWS]


def _contributors(made: Lineage) -> dict[str, Any]:
    training = made.shares()
    rounds: defaultdict[str, list[int]] = defaultdict(list)
    for (who, number_), weight in made.updates.items():
        if weight > 0:
            rounds[who].append(number_)
    earlier: defaultdict[str, float] = defaultdict(float)
    for (who, _), weight in made.earlier.items():
        earlier[who] += weight
    rows = [
        {
            "agent": who,
            "rounds": spans(rounds[who]),
            "training": training.get(who, 0.0),
            "first": made.initial.get(who, 0.0),
            "earlier": earlier[who],
        }
        for who in {**training, **made.initial, **earlier}
    ]
    rows.sort(key=lambda row: (-float(row["training"]), str(row["agent"])))
    updates = [[who, number_, weight] for (who, number_), weight in made.updates.items() if weight > 0]
    return {"contributors": rows, "updates": updates[-MOST_UPDATES:]}
