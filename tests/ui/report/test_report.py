"""The files of a report: CSV equal to the results, one page that loads nothing, pictures, links."""

from __future__ import annotations

import base64
import csv
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dimat.errors import DataError
from dimat.events import Event, Warned
from dimat.results import Comparison, Results
from dimat.ui.report.report import write_comparison_report, write_report
from dimat.ui.verdict import of_run
from tests.ui.samples import make_results

VOID = {"meta", "img", "br", "hr", "link", "input"}
HOSTILE = '<script>alert("x")</script>\x1b[2J\'"&'


class Page(HTMLParser):
    """Checks that elements nest, and collects what the tests ask about."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def save(results: Results, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(results.model_dump_json(), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """One run folder with its report, shared by the tests that only read."""
    results = make_results().model_copy(update={"warnings": ["agent-3 holds few samples"]})
    folder = save(results, tmp_path_factory.mktemp("report") / "run")
    return folder, write_report(folder)


def test_a_report_is_complete_and_leaves_nothing_else(run: tuple[Path, list[Path]]) -> None:
    """Reference: the list of files that is returned and the folder itself."""
    folder, written = run
    names = {path.relative_to(folder).as_posix() for path in written}
    pictures = {f"plots/{name}.png" for name in ("accuracy", "merge", "consensus", "topology", "classes")}
    assert names == {"rounds.csv", "report.html"} | pictures
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == names | {"results.json"}
    assert all(path.stat().st_size > 0 for path in written)


def test_the_page_begins_with_the_verdict(run: tuple[Path, list[Path]]) -> None:
    """Reference: the line that the terminal prints; it comes before any number and any picture."""
    page = (run[0] / "report.html").read_text(encoding="utf-8")
    line = escape(of_run(make_results()).line)
    assert 0 < page.index(line) < min(page.index('class="facts"'), page.index("<img"))


def test_csv_equals_the_results(run: tuple[Path, list[Path]]) -> None:
    """Reference: the rows of results.json, number for number."""
    with open(run[0] / "rounds.csv", newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    wanted = [row.model_dump() for row in make_results().rows]
    assert [set(row) for row in read] == [set(row) for row in wanted]
    for got, row in zip(read, wanted, strict=True):
        assert {k: None if row[k] is None and v == "" else type(row[k])(v) for k, v in got.items()} == row


def test_csv_is_empty_where_nothing_was_measured(tmp_path: Path) -> None:
    """Reference: a run without evaluation."""
    write_report(save(make_results(rounds=1, evaluated=False), tmp_path))
    with open(tmp_path / "rounds.csv", newline="", encoding="utf-8") as file:
        assert {(row["before"], row["after"]) for row in csv.DictReader(file)} == {("", "")}


def test_the_page_is_whole_and_loads_nothing(run: tuple[Path, list[Path]]) -> None:
    """Reference: html.parser; every picture is data with a description, and equals the file beside it."""
    folder, _ = run
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(folder / "report.html")
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base", "form"}
    images = page.named("img")
    assert len(images) == 5
    files = [folder / "plots" / f"{name}.png" for name in ("accuracy", "merge", "consensus", "topology", "classes")]
    for image, file in zip(images, files, strict=True):
        assert image["alt"]
        head, _, data = (image["src"] or "").partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data) == file.read_bytes()
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.named("meta")
    assert "prefers-color-scheme: dark" in text


def test_the_page_says_what_happened(run: tuple[Path, list[Path]]) -> None:
    """Reference: numbers from the results, counted by hand."""
    page = Page(run[0] / "report.html")
    cells = [row[0] for row in page.rows]
    assert "10/10" in cells
    assert cells.count("agent-4") == 2  # at the end, and who holds what
    assert ["train", "4.1 s"] == [cells[cells.index("CPU: train")].split()[1], page.rows[cells.index("CPU: train")][1]]
    assert ["train.optimizer.lr", "0.002"] in page.rows
    text = "".join(page.text)
    assert "agent-3 holds few samples" in text
    assert "load_file('final/agent-0.safetensors')" in text
    assert "method dimat, seed 0, 5 agents, 5 edges, 235,146 parameters, 940.6 kB a snapshot" in text


def test_a_second_report_is_equal(run: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """Reference: equal results give equal files, byte for byte."""
    folder, written = run
    (tmp_path / "results.json").write_bytes((folder / "results.json").read_bytes())
    for again, first in zip(write_report(tmp_path), written, strict=True):
        assert again.read_bytes() == first.read_bytes()


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    """Reference: an element, quotes and an escape sequence in every name; none of it becomes markup."""
    results = make_results(names=[HOSTILE, "b", "c"], rounds=1).model_copy(
        update={
            "run": HOSTILE,
            "metric": HOSTILE,
            "method": HOSTILE,
            "classes": [HOSTILE] * 10,
            "warnings": [HOSTILE],
            "config": {HOSTILE: {HOSTILE: HOSTILE}},
            "cpu_s": {HOSTILE: 1.0},
            "version": HOSTILE,
            "status": "failed",
        }
    )
    write_report(save(results, tmp_path))
    page = Page(tmp_path / "report.html")
    assert "script" not in {tag for tag, _ in page.tags}
    assert "\x1b" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    text = "".join(page.text)
    assert '<script>alert("x")</script>\\x1b[2J' in text
    assert "'failed'" in text


def test_without_matplotlib_the_rest_is_written(
    tmp_path: Path, comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: no picture, no error; the page and the listener say why."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    heard: list[Event] = []
    written = write_report(save(make_results(rounds=2), tmp_path / "run"), heard.append)
    assert [path.name for path in written] == ["rounds.csv", "report.html"]
    others = write_comparison_report(comparison, {"one": tmp_path / "run"}, tmp_path / "out", heard.append)
    assert [path.name for path in others] == ["comparison.json", "comparison.csv", "timeline.csv", "report.html"]
    for path in (written[-1], others[-1]):
        page = Page(path)
        assert page.named("img") == []
        assert 'pip install "dimat[plots]"' in "".join(page.text)
    told = [event.message for event in heard if isinstance(event, Warned)]
    assert len(told) == len(heard) == 3
    assert ["no pictures" in message for message in told].count(True) == 2
    assert any("contributions are not known: the run folder has no lineage.jsonl" in message for message in told)
    assert heard[0].run == "digits-ring"
    write_report(tmp_path / "run")  # nobody listens: no error either


def test_comparison_report(tmp_path: Path, comparison: Comparison) -> None:
    """Reference: the comparison itself, read back from JSON and CSV; links that lead to the runs' pages."""
    run = tmp_path / "runs" / "dimat iid#0"
    run.mkdir(parents=True)
    (run / "report.html").write_text("x")
    out = tmp_path / "out"
    written = write_comparison_report(comparison, [("dimat <b>", run), ("not run", tmp_path / "none")], out)
    assert [path.relative_to(out).as_posix() for path in written] == [
        "comparison.json",
        "comparison.csv",
        "timeline.csv",
        "plots/comparison.png",
        "report.html",
    ]
    assert Comparison.model_validate_json(written[0].read_text(encoding="utf-8")) == comparison
    with open(written[1], newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 5 * 10
    row = next(r for r in rows if (r["split"], r["method"], r["merge"]) == ("iid", "dimat", "3"))
    curve = comparison.splits["iid"]["dimat"]
    assert float(row["accuracy_mean"]) == curve.after_merge[2]
    assert float(row["accuracy_std"]) == curve.std[2]
    assert float(row["mb_sent_per_agent"]) == pytest.approx(0.3 * curve.mb_sent_per_agent)
    page = Page(written[-1])
    assert [image["alt"] for image in page.named("img")] != [None]
    assert page.named("a") == [{"href": "../runs/dimat%20iid%230/report.html"}]
    assert "dimat <b>" in page.text
    assert sum(1 for cell in page.named("td") if cell.get("class") == "best") > 10
    assert ["method", "merge 1", "merge 2", "merge 3", "merge 5", "merge 10"] == page.rows[0][:6]


def test_the_snippet_names_a_file_that_is_there(tmp_path: Path) -> None:
    """Reference: the folder final/ as the run left it."""
    folder = save(make_results(rounds=1, evaluated=False), tmp_path)
    (folder / "final").mkdir()
    (folder / "final" / "lab.safetensors").touch()
    write_report(folder)
    assert "load_file('final/lab.safetensors')" in "".join(Page(folder / "report.html").text)


def test_errors(tmp_path: Path, comparison: Comparison) -> None:
    """Reference: DataError for a folder without results and for one that cannot be written."""
    with pytest.raises(DataError, match="no results"):
        write_report(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot write"):
        write_comparison_report(comparison, {}, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
