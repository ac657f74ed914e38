"""The report of an agent's folder. Reference: lineages worked out by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from dimat.agent.lineage.lineage import append_record
from dimat.agent.protocol.messages import MergeRecord
from dimat.cli import main
from dimat.events import Contribution, MergeResult
from dimat.ui.report.agent_summary import spans
from tests.agent.lineage.test_verify import fetched
from tests.agent.lineage.test_verify import write as write_manifests
from tests.net.keys import Authority

ROOT = "ab" * 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Agent a has merged twice with b, whose second snapshot started from a merge with c, which a never heard of."""
    authority = Authority()
    b = authority.issue("b")
    first = fetched(b, 1)
    root = first.manifest.payload.root
    second = fetched(b, 2, (("b", root, 1, 0.5), ("c", ROOT, 1, 0.5)))
    write_manifests(tmp_path, authority, first, second)
    (tmp_path / "agent.json").write_text('{"run": "run", "agent": "a"}\n')
    for number, arrived in ((1, first), (2, second)):
        parts = (
            Contribution(agent="a", snapshot=f"a{number}", round=number, weight=0.5),
            Contribution(agent="b", snapshot=arrived.manifest.payload.root, round=number, weight=0.5),
        )
        after = {"accuracy": 0.5 + number / 10}
        append_record(
            tmp_path / "lineage.jsonl", MergeRecord("a", number, f"a{number}", parts, MergeResult(after=after))
        )
    return tmp_path


def test_table_csv_and_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """a₂ = ½(a₁ + τa₂) + ½(½(b₀ + τb₁) + ½(c before 1 + τc₁) + τb₂), a₁ = ½(a₀ + τa₁) + ½(b₀ + τb₁)."""
    assert main(["report", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["first"] == {"a": 0.25, "b": 0.5}
    assert found["earlier"] == [{"agent": "c", "round": 1, "weight": 0.25}]
    weights = {(entry["agent"], entry["round"]): entry["weight"] for entry in found["training"]}
    assert weights == {("a", 1): 0.25, ("a", 2): 0.5, ("b", 1): 0.5, ("b", 2): 0.5, ("c", 1): 0.25}
    with (folder / "lineage.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["contributor"], int(row["contributor_round"])): float(row["weight"]) for row in rows} == {
        **weights,
        ("a", 0): 0.25,
        ("b", 0): 0.5,
        ("c", 1): 0.25,
    }
    assert [row["part"] for row in rows if row["contributor"] == "c"] == ["training", "earlier"]
    assert main(["report", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "accuracy" in out
    assert "1-2" in out
    assert "their origin is not known" in out


def test_verify_names_a_line_that_was_changed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0 as it was written, 4 once a weight in it is another."""
    words = ["report", str(folder), "--verify", "--keys", str(folder)]
    assert main(words) == 0
    assert "2 signed manifests checked, 0 faults" in capsys.readouterr().err
    path = folder / "manifests.jsonl"
    path.write_text(path.read_text().replace("0.5]]", "0.25]]"))
    assert main(words) == 4
    assert "manifests.jsonl, line 2 (b, round 2)" in capsys.readouterr().err


def test_lines_that_cannot_be_read_are_told_in_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They vouch for nothing, and no merge rests on them; what merges rest on is still there."""
    path = folder / "manifests.jsonl"
    path.write_text(path.read_text() + "[]\n\x00\x1b[31m\n{}\n")
    assert main(["report", str(folder), "--verify", "--keys", str(folder)]) == 0
    said = capsys.readouterr().err
    assert "manifests.jsonl, line 3 and 2 more: cut short or damaged, which proves nothing" in said
    assert "2 signed manifests checked, 0 faults" in said


def test_what_it_is_not_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--verify is for agents' folders; an agent without a merge has nothing to report."""
    assert main(["report", str(tmp_path), "--verify"]) == 2
    assert "not an agent's folder" in capsys.readouterr().err
    (tmp_path / "agent.json").write_text('{"run": "run", "agent": "a"}\n')
    assert main(["report", str(tmp_path)]) == 5
    assert "no merge on record" in capsys.readouterr().err


def test_rounds_as_people_write_them() -> None:
    assert spans([3, 1, 2, 7, 9, 10]) == "1-3, 7, 9-10"
