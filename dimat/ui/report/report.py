"""Writes the reports of a run or a comparison: CSV, pictures and one HTML page.

Files appear complete or not at all: each is written under a temporary name and renamed. Without matplotlib the report
has no pictures and says so.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from dimat.errors import ConfigError, DataError
from dimat.events import Listener, Warned
from dimat.results import AgentRound, Comparison, Results, read_results
from dimat.ui import tables, text, verdict
from dimat.ui.report import lineage, page, plots
from dimat.ui.terminal.lines import told_once
from dimat.ui.text import Table
from dimat.weights.durable import write_bytes

ALT = {
    "accuracy": "Line plot: test metric of each agent after each merge, with the mean and the range over agents",
    "merge": "Test metric before and after each merge, mean over agents",
    "consensus": "Line plot, logarithmic: consensus distance of each agent after each merge",
    "topology": "Graph of the agents, coloured by their final test metric",
    "classes": "Heat map: training samples per class that each agent holds",
    "timeline": "Line plots: mean test metric of the agents' newest models over virtual time and over megabytes",
    "comparison": "Test metric of each method over merges, virtual time and megabytes per agent, for each split",
}


def write_report(run_dir: str | Path, listener: Listener | None = None) -> list[Path]:
    """Write `rounds.csv`, `lineage.csv`, `plots/*.png` and `report.html` into a run folder, from its `results.json`
    and `lineage.jsonl`.

    Returns the written files. Without matplotlib there are no pictures, and without a readable ledger no contributions;
    the page says so and `listener` receives a `Warned`. Raises DataError if the results cannot be read or a file cannot
    be written.
    """
    folder = Path(run_dir)
    results = read_results(folder)
    try:
        drawn, missing = plots.results_pngs(results), ""
    except ConfigError as error:
        drawn, missing = {}, _without_pictures(error, results.run, listener)
    try:
        made, unknown = lineage.contributions(folder, results), ""
    except DataError as error:
        made, unknown = None, _told(f"contributions are not known: {error}", results.run, listener)
    written = [_write(folder / "rounds.csv", rounds_csv(results))]
    if made is not None:
        written.append(_write(folder / "lineage.csv", _csv(lineage.HEADER, lineage.lineage_rows(made))))
    written += [_write(folder / "plots" / f"{name}.png", png) for name, png in drawn.items()]
    notices = [message for message in (missing, unknown) if message]
    return [*written, _write(folder / "report.html", _run_page(folder, results, drawn, made, notices).encode())]


def write_comparison_report(
    comparison: Comparison,
    run_dirs: Mapping[str, str | Path] | Sequence[tuple[str, str | Path]],
    out_dir: str | Path,
    listener: Listener | None = None,
) -> list[Path]:
    """Write `comparison.json`, `comparison.csv`, `timeline.csv`, `plots/comparison.png` and `report.html`.

    `run_dirs`: label → folder of each single run; those that have a `report.html` are linked from the page. Returns the
    written files; matplotlib and errors as in `write_report`.
    """
    folder = Path(out_dir)
    labelled = list(run_dirs.items()) if isinstance(run_dirs, Mapping) else list(run_dirs)
    try:
        drawn, missing = {"comparison": plots.comparison_png(comparison)}, ""
    except ConfigError as error:
        drawn, missing = {}, _without_pictures(error, "", listener)
    html = _comparison_page(folder, comparison, labelled, drawn, missing)
    return [
        _write(folder / "comparison.json", (comparison.model_dump_json(indent=2) + "\n").encode()),
        _write(folder / "comparison.csv", _csv(*tables.comparison_rows(comparison))),
        _write(folder / "timeline.csv", _csv(*tables.timeline_rows(comparison))),
        *(_write(folder / "plots" / f"{name}.png", png) for name, png in drawn.items()),
        _write(folder / "report.html", html.encode()),
    ]


def rounds_csv(results: Results) -> bytes:
    """Return a row per agent and round, columns as the fields of `AgentRound`; empty if not measured."""
    columns = tuple(AgentRound.model_fields)
    return _csv(columns, ([getattr(row, column) for column in columns] for row in results.rows))


def _without_pictures(error: ConfigError, run: str, listener: Listener | None) -> str:
    return _told(f"the report has no pictures: {error}", run, listener)


def _told(message: str, run: str, listener: Listener | None) -> str:
    if listener is not None:
        listener(Warned(run=run, message=message))
    return message


def write_csv(file: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    """Write a table, complete or not at all; DataError on failure."""
    return _write(file, _csv(header, rows))


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return file.getvalue().encode()


def _write(file: Path, content: bytes) -> Path:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write {file}: {error.strerror or error}") from error
    write_bytes(file, content, durable=False)
    return file


# ---- the pages


def _run_page(
    folder: Path,
    results: Results,
    drawn: Mapping[str, bytes],
    made: lineage.Contributions | None,
    missing: Sequence[str],
) -> str:
    summaries = tables.summarise(results)
    last = summaries[-1] if summaries else None
    head = tables.run_line(
        results.method,
        results.seed,
        len(results.agents),
        len(results.edges),
        results.parameters,
        results.snapshot_bytes,
    )
    clock = tables.clock_text(max(row.time_s for row in results.rows), last.round) if last else ""
    numbers = [
        (f"{results.metric} at the end, mean of agents", text.metric_text(last.after_mean if last else None)),
        ("lowest and highest agent", text.range_text(last.after_min, last.after_max) if last else text.NONE),
        ("rounds", tables.round_text(last.round, last.rounds) if last else "0"),
        *([("virtual time", clock)] if clock else []),
        ("consensus distance at the end", text.distance_text(last.consensus_distance) if last else text.NONE),
        ("MB sent per agent", text.mb_text(results.mb_sent_per_agent)),
        ("wall clock", text.seconds_text(results.wall_s)),
    ]
    status = [] if results.status == "done" else [f"this run has the status {results.status!r}: it is not complete"]
    classes = tables.histogram_table(results.histogram, results.classes, full=True)
    settings = Table("", ("key", "value"), tuple(tables.flattened(results.config)), left=frozenset({0, 1}))
    pieces = [
        page.heading(results.run, head, [verdict.of_run(results).line]),
        page.notices([*status, *missing, *told_once(results.warnings)]),
        page.facts(numbers),
        page.section("Pictures", page.pictures((ALT[name], png) for name, png in drawn.items())),
        page.section("Rounds", page.table(tables.round_table(results))),
        page.section("Agents at the end", page.table(tables.final_table(results))),
        page.section("Training samples per class", page.table(classes) if results.histogram else ""),
        page.section("Contributions to the final models", _contributions(made)),
        page.section("Cost", page.table(tables.cost_table(results))),
        page.section("Load a model", _loading(folder, results)),
        page.section("Configuration", page.folded("all settings", page.table(settings)) if settings.rows else ""),
        _footer(results.version),
    ]
    return page.document(f"{results.run}: dimat report", pieces)


def _contributions(made: lineage.Contributions | None) -> str:
    if made is None or len(made.agents) == 1:
        return ""
    note = made.note()
    initial = page.folded("initial networks in the final models", page.table(lineage.initial_table(made)))
    return page.table(lineage.training_table(made)) + initial + (page.paragraph(note) if note else "")


def _loading(folder: Path, results: Results) -> str:
    found = sorted(file.name for file in (folder / "final").glob("*.safetensors"))
    names = found or [f"{agent}.safetensors" for agent in results.agents]
    if not names:
        return ""
    snippet = (
        "from safetensors.torch import load_file\n\n"
        f"state = load_file({'final/' + text.clean(names[0])!r})\n"
        "model.load_state_dict(state)  # model: built as in training\n"
    )
    others = f" The folder final/ holds one such file per agent ({len(names)})." if len(names) > 1 else ""
    return page.paragraph("Weights are plain safetensors; dimat is not needed to read them." + others) + page.code(
        snippet
    )


def _comparison_page(
    folder: Path,
    comparison: Comparison,
    labelled: Sequence[tuple[str, str | Path]],
    drawn: Mapping[str, bytes],
    missing: str,
) -> str:
    methods = list(dict.fromkeys(method for curves in comparison.splits.values() for method in curves))
    head = f"{', '.join(methods)} on {text.count_text(len(comparison.splits), 'split')}"
    reports = [(label, Path(run) / "report.html") for label, run in labelled]
    pieces = [
        page.heading("Comparison of methods", head, verdict.headlines(comparison)),
        page.notices([missing] if missing else []),
        *(page.section(table.title, page.table(table)) for table in tables.comparison_tables(comparison)),
        page.section("Pictures", page.pictures(((ALT[name], png) for name, png in drawn.items()), wide=True)),
        page.section("Single runs", page.links((k, _address(v, folder)) for k, v in reports if v.exists())),
        _footer(""),
    ]
    return page.document("dimat comparison", pieces)


def _address(file: Path, folder: Path) -> str:
    """Return the relative link from a page in `folder`, so that the whole tree can be moved or zipped."""
    return quote(Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix())


def _footer(version: str) -> str:
    made = f"Made by dimat {version}".strip()
    return (
        f"<footer>{page.esc(made)}. This page loads nothing from elsewhere; the numbers are beside it as CSV.</footer>"
    )
