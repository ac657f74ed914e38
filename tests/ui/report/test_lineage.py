"""Who contributed what, as the report shows it: by hand on a small ledger, and through a whole report."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from dimat.agent.lineage.lineage import append_record
from dimat.agent.protocol.messages import MergeRecord
from dimat.errors import DataError
from dimat.events import Contribution
from dimat.ui.report.lineage import contributions, initial_table, lineage_rows, training_table
from dimat.ui.report.report import write_report
from tests.ui.samples import make_results


def part(agent: str, number: int, weight: float) -> Contribution:
    return Contribution(agent=agent, snapshot=f"{agent}{number}", round=number, weight=weight)


def record(agent: str, number: int, *parts: Contribution) -> MergeRecord:
    return MergeRecord(agent, number, f"{agent}{number}", parts)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """a and b average once, half and half; then a goes on alone and b takes a quarter of a. c never merged."""
    records = [
        record("a", 1, part("a", 1, 0.5), part("b", 1, 0.5)),
        record("b", 1, part("b", 1, 0.5), part("a", 1, 0.5)),
        record("a", 2, part("a", 2, 1.0)),
        record("b", 2, part("b", 2, 0.75), part("a", 2, 0.25)),
    ]
    for each in records:
        append_record(tmp_path / "lineage.jsonl", each, durable=False)
    return tmp_path


def test_tables_by_hand(ledger: Path) -> None:
    """a: .5 of each's first round and 1 of its own second; b: .5 and .5, then .75 of its own and .25 of a's."""
    results = make_results(names=["a", "b", "c"], rounds=2)
    results = results.model_copy(update={"rows": [row for row in results.rows if row.agent != "c"]})
    found = contributions(ledger, results)
    assert found.unknown == ("c",)
    assert "c" in found.note()
    assert initial_table(found).rows == (("a", "50", "50", "."), ("b", "50", "50", "."))
    assert training_table(found).rows == (("a", "75", "25", "."), ("b", "38", "62", "."))
    rows = {(row[0], row[1]): row[2:] for row in lineage_rows(found)}
    assert rows == {
        ("a", "a"): (0.5, 0.75, 2),
        ("a", "b"): (0.5, 0.25, 1),
        ("b", "a"): (0.5, 0.375, 2),
        ("b", "b"): (0.5, 0.625, 2),
    }


def test_many_agents_name_the_largest(tmp_path: Path) -> None:
    """Above 24 agents a matrix would not fit: own share, how many agents are in it, and the three largest others."""
    names = [f"n{i}" for i in range(30)]
    for name in names:
        others = [part(other, 1, 0.02 if other != "n7" else 0.08) for other in names if other != name]
        own = part(name, 1, 1 - sum(each.weight for each in others))
        append_record(tmp_path / "lineage.jsonl", record(name, 1, own, *others), durable=False)
    found = contributions(tmp_path, make_results(names=names, rounds=1))
    first = training_table(found).rows[0]
    assert first[:3] == ("n0", "36", "30")
    assert first[3].startswith("n7 8, ")
    assert len(first[3].split(",")) == 3


def test_the_report_has_it(ledger: Path) -> None:
    """`lineage.csv` beside the page and the table in it; a ledger that lacks a merge is said, not guessed."""
    results = make_results(names=["a", "b"], rounds=2)
    (ledger / "results.json").write_text(results.model_dump_json())
    write_report(ledger)
    with open(ledger / "lineage.csv", newline="", encoding="utf-8") as file:
        shares = {(row["agent"], row["contributor"]): float(row["share_of_training"]) for row in csv.DictReader(file)}
    assert shares["b", "a"] == pytest.approx(0.375)
    assert "percent of the training" in (ledger / "report.html").read_text(encoding="utf-8")
    with pytest.raises(DataError, match="no record of a merge of a in round 5"):
        contributions(ledger, make_results(names=["a", "b"], rounds=5))
    (ledger / "lineage.jsonl").unlink()
    write_report(ledger)
    assert "contributions are not known" in (ledger / "report.html").read_text(encoding="utf-8")
