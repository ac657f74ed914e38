"""Every registered combine method in a network: test accuracy on digits after the first and after the tenth merge.

Agents start from the same random weights, which are the base of all deltas, train five epochs alone, merge, and train
two epochs before each further merge (three-layer BatchNorm CNN, Adam 2e-3, batches of 64). Five agents on a ring with
mixing weights 1/3; methods that merge two models run on a path of two agents with mixing weights 1/2, in a table of
their own. Runs are those of `dimat simulate`, each in a process of one thread.

What is shown: the merged models' accuracy on the 360 test images, which no agent trains on, right after the merge;
mean over agents, then over seeds. "as they are": merged unit by unit. "aligned": agents first bring each other into
one order of units (align = "activations", shared basis). BatchNorm is re-estimated after every merge on the agent's own
data, unless a row says otherwise. MB: what an agent sends in all; statistics travel with weights. Methods have their
default options, but where a row names others. "isolated" never merges.

Most of these methods were made for deltas that are small beside the base, of large models fine-tuned from one
pre-trained one. Here the base is random and the deltas are all that was learned: the table says how methods serve
training from the start, not how they serve fine-tuned models. Agents with one start have their units in one order
already: what alignment moves then is mostly noise, and the base does not move with it.

Reference: `average`; target: some other method ends no worse, and none fails that could run. The full run takes about
20 CPU-minutes, half of that on two cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from _common import Result, finish, options, table

from dimat.errors import DimatError
from dimat.merge.registry import combine_registry
from dimat.simulate import run_simulation
from dimat.simulate.engines.pool import default_workers

PAIRS = ("slerp", "nuslerp")
"""Methods that merge two models."""
NOT_HERE = {"lora-": "merges the pairs of factors of LoRA adapters; the model of digits has none"}
"""Beginning of a method's name → why it is left out."""
VARIANTS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "ties": ({"density": 1.0},),
    "dare-ties": ({"density": 0.9},),
    "della": ({"density": 0.9, "epsilon": 0.05},),
    "pcb-merging": ({"ratio": 0.5},),
    "consensus": ({"k": 1},),
    "emr": ({"output": "unified"},),
    "tsv-m": ({"scaling": 0.5},),
    "iso-c": ({"scaling": 0.5},),
    "opcm": ({"alpha": 0.0},),
    "layer-swap": ({"layers": {"fc.*": 0}},),
}
"""Options to be shown beside the defaults: defaults that drop or amplify most of a delta are made for small ones;
layer-swap has no rule of its own, here it keeps each agent's own classifier."""
QUICK = ("average", "ties", "fisher", "slerp")
SPLITS = {"dirichlet": {"kind": "dirichlet", "alpha": 0.5}, "iid": {"kind": "iid"}}
AS_THEY_ARE, ALIGNED = "none", "activations"
RING, PATH = 5, 2


@dataclass(frozen=True, eq=False)
class Row:
    """A line of the table. `merge`: settings of the merge."""

    label: str
    agents: int
    merge: Mapping[str, Any]
    aligns: tuple[str, ...] = (AS_THEY_ARE, ALIGNED)


@dataclass(frozen=True)
class Cell:
    """One run. `rounds`: merges."""

    row: Row
    split: str
    align: str
    seed: int
    rounds: int


@dataclass(frozen=True)
class Outcome:
    """What a run gave: mean accuracy over agents after each merge, MB that an agent sent, CPU-seconds; or why not."""

    accuracy: list[float] = field(default_factory=list[float])
    mb: float = 0.0
    cpu_s: float = 0.0
    failed: str = ""


def rows(names: Iterable[str], *, variants: bool) -> list[Row]:
    """Return the lines of both tables, references first."""
    found: list[Row] = []
    for agents in (RING, PATH):
        found.append(Row("isolated", agents, {"method": "isolated"}, (AS_THEY_ARE,)))
        found.append(_row("average", agents, {}))
    if variants:
        found.append(Row("average, BatchNorm averaged too", RING, {"combine": "average", "repair": "none"}))
    for name in names:
        if name == "average" or name.startswith(tuple(NOT_HERE)):
            continue
        agents = PATH if name in PAIRS else RING
        found.append(_row(name, agents, {}))
        if variants:
            found += [_row(name, agents, chosen) for chosen in VARIANTS.get(name, ())]
    return found


def _row(name: str, agents: int, chosen: Mapping[str, Any]) -> Row:
    said = ", ".join(f"{key} = {value}" for key, value in chosen.items())
    merge = {"combine": {"name": name, "options": dict(chosen)}, "repair": "batchnorm"}
    # variants, and methods that learn their coefficients in steps, which takes most of the time, are not aligned too
    once = said or "steps" in combine_registry.options(name)
    return Row(f"{name} ({said})" if said else name, agents, merge, (AS_THEY_ARE,) if once else (AS_THEY_ARE, ALIGNED))


def run(cell: Cell) -> Outcome:
    """Simulate one network."""
    began = time.process_time()
    merge = {"method": "average", "align": cell.align, "base": {"seed": cell.seed}, **cell.row.merge}
    if merge["method"] == "isolated":
        merge = {"method": "isolated"}
    tree: dict[str, Any] = {
        "run": f"{cell.row.label} {cell.align} {cell.split} {cell.seed}",
        "seed": cell.seed,
        "topology": {"graph": "ring" if cell.row.agents > PATH else "path", "agents": cell.row.agents},
        "task": {"name": "digits", "partition": SPLITS[cell.split]},
        "train": {
            "initialisation": "shared",
            "first_round_epochs": 5,
            "epochs_per_round": 2,
            "batch_size": 64,
            "optimizer": {"name": "adam", "lr": 2e-3},
        },
        "merge": merge,
        "schedule": {"rounds": cell.rounds},
        "simulate": {"workers": 1, "evaluate": "after"},
    }
    try:
        results = run_simulation(tree)
    except DimatError as error:
        return Outcome(failed=str(error))
    return Outcome(results.after_merge(), results.mb_sent_per_agent, time.process_time() - began)


def run_all(cells: Sequence[Cell], workers: int) -> dict[Cell, Outcome]:
    """Run all, side by side, saying how far it is."""
    found: dict[Cell, Outcome] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = {pool.submit(run, cell): cell for cell in cells}
        for job in as_completed(jobs):
            cell = jobs[job]
            found[cell] = job.result()
            what = found[cell].failed or f"{found[cell].accuracy[-1]:.3f}, {found[cell].cpu_s:.0f} s"
            print(
                f"{len(found)}/{len(cells)} {cell.row.label}, {cell.align}, {cell.split}, seed {cell.seed}: {what}",
                file=sys.stderr,
            )
    return found


@dataclass(frozen=True)
class Line:
    """Means over seeds. `first`, `last`: by alignment, after the first and the last merge; `spread`: the largest
    difference between seeds after the last one."""

    row: Row
    first: Mapping[str, float]
    last: Mapping[str, float]
    mb: float
    spread: float


def line_of(row: Row, split: str, found: Mapping[Cell, Outcome]) -> Line | None:
    """Return the means of a row's runs; None where one of them failed."""
    mine = [(cell, outcome) for cell, outcome in found.items() if cell.row is row and cell.split == split]
    runs = {align: [outcome for cell, outcome in mine if cell.align == align] for align in row.aligns}
    if any(outcome.failed for _, outcome in mine):
        return None
    lasts = {align: [o.accuracy[-1] for o in outcomes] for align, outcomes in runs.items()}
    return Line(
        row,
        {align: fmean(o.accuracy[0] for o in outcomes) for align, outcomes in runs.items()},
        {align: fmean(values) for align, values in lasts.items()},
        fmean(o.mb for o in runs[AS_THEY_ARE]),
        max(max(values) - min(values) for values in lasts.values()),
    )


def lines_of(agents: int, split: str, shown: Sequence[Row], found: Mapping[Cell, Outcome]) -> list[Line]:
    """Return the lines of a table, the best after the last merge first."""
    lines = [line for row in shown if row.agents == agents and (line := line_of(row, split, found)) is not None]
    return sorted(lines, key=lambda line: -line.last[AS_THEY_ARE])


def headers(rounds: int) -> list[str]:
    return ["method", *(f"{n}: {how}" for n in (1, rounds) for how in ("as they are", "aligned")), "MB"]


def cells_of(line: Line) -> list[str]:
    values = [part.get(align) for part in (line.first, line.last) for align in (AS_THEY_ARE, ALIGNED)]
    return [line.row.label, *("" if v is None else f"{v:.3f}" for v in values), f"{line.mb:.2f}"]


def markdown(command: str, tables: Mapping[str, Sequence[Line]], rounds: int, notes: Sequence[str]) -> str:
    """Return the page."""
    text = (__doc__ or "").strip().splitlines()
    parts = ["# Combine methods in a network, measured", "", f"Made by `{command}`.", "", *text, ""]
    for title, lines in tables.items():
        parts += [f"## {title}", "", "| " + " | ".join(headers(rounds)) + " |", "|---|" + "---:|" * 5]
        parts += ["| " + " | ".join(cells_of(line)) + " |" for line in lines]
        parts.append("")
    return "\n".join([*parts, *(f"- {note}" for note in notes)]) + "\n"


def main() -> int:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these, without further options")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10, help="merges (default 10)")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=["dirichlet"], help="default: dirichlet (0.5)")
    parser.add_argument("--workers", type=int, default=min(default_workers(), 8), help="runs side by side")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file too")
    given: argparse.Namespace = parser.parse_args()
    known = combine_registry.names()
    names: list[str] = given.methods or ([*QUICK] if given.quick else known)
    for name in names:
        combine_registry.get(name)
    seeds, rounds = (1, 2) if given.quick else (given.seeds, given.rounds)
    shown = rows(names, variants=not given.quick and not given.methods)
    cells = [
        Cell(row, split, align, seed, rounds)
        for split in given.splits
        for seed in range(seeds)
        for row in shown
        for align in row.aligns
    ]
    found = run_all(cells, given.workers)

    tables: dict[str, list[Line]] = {}
    for split in given.splits:
        what = "Dirichlet 0.5" if split == "dirichlet" else "IID"
        tables[f"Five agents on a ring, {what}"] = lines_of(RING, split, shown, found)
        tables[f"Two agents, {what}"] = lines_of(PATH, split, shown, found)
    for title, lines in tables.items():
        print(f"\n{title}: mean test accuracy of the merged models after merge 1 and merge {rounds}")
        table(headers(rounds), [cells_of(line) for line in lines])

    failures = {c.row.label: f"{o.failed} (align = {c.align}, {c.split})" for c, o in found.items() if o.failed}
    spread = max((line.spread for lines in tables.values() for line in lines), default=0.0)
    cpu = sum(outcome.cpu_s for outcome in found.values())
    notes = [f"{len(cells)} runs, {cpu / 60:.1f} CPU-minutes in all."]
    if seeds > 1:
        notes.append(f"{seeds} seeds; after the last merge they differ by {spread:.3f} at most, in one cell.")
    left_out = {name: why for name in known for start, why in NOT_HERE.items() if name.startswith(start)}
    notes += [f"`{name}` is left out: it {why}." for name, why in left_out.items()]
    notes += [f"`{label}` failed: {why}." for label, why in failures.items()]
    print()
    for note in notes:
        print(note)
    if given.markdown is not None:
        flags = " ".join(sys.argv[1:]).replace(f"--markdown {given.markdown}", "").split()
        given.markdown.write_text(
            markdown(" ".join(["python benchmarks/merge_methods.py", *flags]), tables, rounds, notes)
        )

    ring = {line.row.label: line.last[AS_THEY_ARE] for line in next(iter(tables.values()))}
    reference = ring["average"]
    measured = max((ring[label] for label in ring if not label.startswith(("average", "isolated"))), default=0.0)
    ratio = measured / reference
    target = ">= 1 (best method over average), none failed"
    finish(Result("merge_methods", measured, reference, ratio, target, ratio >= 1 and not failures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
