"""Keeps an agent's ledgers short, with the lineage of every later model unchanged.

A model's lineage needs the whole ledgers of own merges and of peers' manifests. `compact` computes the lineage of the
models on which later records still depend, writes it to `lineage.summary.json`, and drops the records before. The
lineage of every later model stays the same, to twelve digits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dimat.agent.lineage.lineage import Ledger, Lineage, Model, read_records
from dimat.agent.lineage.manifest_log import ManifestLedger, peers_records, read_ledger, starts
from dimat.agent.protocol.messages import MergeRecord
from dimat.errors import DataError
from dimat.json_text import to_json
from dimat.weights.durable import write_bytes

SUMMARY = "lineage.summary.json"
FORMAT = 1
EQUAL = 1e-12
"""Weights of one agent's rounds in a row that differ by less, relatively, are written as one."""


class Compaction:
    """Compacts the ledgers of `agent` if one of them is about to exceed its bound.

    `records`: file of its own merges, bounded by `most_bytes`; `manifests`: the ledger of its peers' manifests.
    """

    def __init__(self, agent: str, records: Path, manifests: ManifestLedger, most_bytes: int) -> None:
        self._agent = agent
        self._records = records
        self._manifests = manifests
        self._most_bytes = most_bytes

    def look(self) -> bool:
        """Compact if it is time; return whether it was. Raises DataError if a file cannot be read or written."""
        full = _size(self._records) > self._most_bytes
        # before the ledger of manifests drops lines by itself, which would lose what they say
        if not full and _size(self._manifests.path) <= 7 * self._manifests.most_bytes // 8:
            return False
        return compact(self._agent, self._records, self._manifests)


def compact(agent: str, records: Path, manifests: ManifestLedger) -> bool:
    """Sum up and drop the older half of an agent's merges, and the manifests that no later one needs.

    Returns whether there were any. Raises DataError as `look` does.
    """
    own = read_records(records)
    rounds = sorted({record.round for record in own})
    if len(rounds) < 2:
        return False
    cut = rounds[len(rounds) // 2 - 1]
    vouched = list(read_ledger(manifests.path))
    peers = [record for record in peers_records(vouched) if record.agent != agent]
    summary = records.with_name(SUMMARY)
    ledger = Ledger([*own, *peers], agent, starts(vouched), read_summary(summary))
    later = [record for record in [*own, *peers] if record.round > cut]
    write_summary(summary, {model: ledger.lineage(model) for model in _rested_on(ledger, later, agent, cut)})
    kept = [record for record in own if record.round > cut]
    lines = [to_json(record.to_dict(), separators=(",", ":")) + "\n" for record in kept]
    write_bytes(records, "".join(lines).encode())
    needed = {(part.agent, part.snapshot) for record in later for part in record.contributions}
    manifests.keep(lambda entry: entry.round > cut or (entry.agent, entry.root) in needed)
    return True


def _rested_on(ledger: Ledger, later: Iterable[MergeRecord], agent: str, cut: int) -> set[Model]:
    """Return the models up to a round that later merges rest on; the agent's own last one always."""
    found = {(agent, max(number for number in ledger.rounds[agent] if number <= cut))}
    for record in later:
        for part in ledger.parts((record.agent, record.round)):
            origin = ledger.origin(part)
            if origin is not None and origin[1] <= cut and (origin in ledger.last or origin in ledger.known):
                found.add(origin)
    return found


# ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────────
def write_summary(path: Path, models: Mapping[Model, Lineage]) -> None:
    """Write the lineage of models; raises DataError if it cannot be written."""
    plain = {
        "format": FORMAT,
        "models": [
            {
                "agent": agent,
                "round": number,
                "initial": dict(made.initial),
                "updates": _runs(made.updates),
                "earlier": _runs(made.earlier),
            }
            for (agent, number), made in sorted(models.items())
        ],
    }
    write_bytes(path, to_json(plain, separators=(",", ":")).encode() + b"\n")


def read_summary(path: Path) -> dict[Model, Lineage]:
    """Read a file of `write_summary`, nothing if there is none; raises DataError if it is damaged."""
    try:
        plain: Any = json.loads(path.read_text(encoding="utf-8"))
        if plain["format"] != FORMAT:
            raise DataError(f"{path} has format {plain['format']}, this dimat reads {FORMAT}; use a newer dimat")
        return {
            (str(each["agent"]), int(each["round"])): Lineage(
                {str(agent): float(weight) for agent, weight in each["initial"].items()},
                _unfolded(each["updates"]),
                _unfolded(each["earlier"]),
            )
            for each in plain["models"]
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"cannot read {path}: {error}; restore it from a backup, or remove it") from error


def _runs(weights: Mapping[Model, float]) -> dict[str, list[list[float]]]:
    """Return weights by agent as [first round, last round, weight] of each run of equal ones."""
    runs: dict[str, list[list[float]]] = {}
    for (agent, number), weight in sorted(weights.items()):
        held = runs.setdefault(agent, [])
        if held and held[-1][1] == number - 1 and abs(held[-1][2] - weight) <= EQUAL * abs(weight):
            held[-1][1] = number
        else:
            held.append([number, number, weight])
    return runs


def _unfolded(runs: Mapping[str, Iterable[Any]]) -> dict[Model, float]:
    return {
        (str(agent), number): float(weight)
        for agent, held in runs.items()
        for first, last, weight in held
        for number in range(int(first), int(last) + 1)
    }


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
