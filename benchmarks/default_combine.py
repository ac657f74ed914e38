"""Which combine method the default `dimat` should have: every split and start, networks of three kinds.

Five agents on a ring, two epochs before each merge (8 or 16 steps, whatever a part's size; CIFAR-10 at 16×16 pixels,
500 images an agent), ten merges, Adam 2e-3, batches of 64. From own starts an agent trains five epochs before the first
merge. All rows are the method `dimat` (skew-aware loss, BatchNorm repair, alignment from own starts) with another
combine method in the default's place; optimizer moments are merged beside `average` and `regmean`, unless a row says
otherwise. "isolated" trains alone. Mean test accuracy over agents after merge 1 and after the last, three
seeds, no run left out, with MB an agent and CPU-seconds a run beside it.

Reference: `regmean`, the combine method of `dimat`; target: no other one is better in most cells by more than the
larger of both deviations over seeds, after the last merge. CIFAR-10's networks need cifar10-train.parquet and
cifar10-test.parquet (Hugging Face's image layout) in --data; without them digits' are measured. About 60 CPU-minutes.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from _common import DATA, Result, finish, options, table

from dimat.simulate import run_simulation
from dimat.simulate.engines.pool import default_workers

COMBINE = ("average", "fisher", "pleas", "pleas, moments merged", "regmean, moments kept", "regmean")
ALONE = "isolated"
DEFAULT = "regmean"
"""The combine method of `dimat` for these networks."""
SPLITS: dict[str, dict[str, Any]] = {
    "iid": {"kind": "iid"},
    "dirichlet-0.5": {"kind": "dirichlet", "alpha": 0.5},
    "dirichlet-0.1": {"kind": "dirichlet", "alpha": 0.1},
    "two-classes": {"kind": "classes", "classes_per_agent": 2},
}
STARTS = ("shared", "own")
DIGITS = {"digits-cnn": {"model": "cnn"}, "digits-mlp": {"model": "mlp"}, "digits-vit": {"model": "vit"}}
CIFAR = {"cifar-cnn": {"model": "cnn", "width": 16}, "cifar-resnet20": {"model": "resnet20", "width": 1}}
STEPS = {"digits": 8, "cifar": 16}
"""Optimizer steps that are about two epochs of an even part."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    network: str
    split: str
    start: str
    combine: str
    seed: int


@dataclass(frozen=True)
class Outcome:
    """Mean accuracy over agents after the first and last merge, MB that an agent sent, CPU-seconds of the run."""

    first: float
    last: float
    mb: float
    cpu_s: float


def run(cell: Cell, data: Path, rounds: int) -> Outcome:
    """Simulate one network."""
    began = time.process_time()
    if cell.network in DIGITS:
        task = {"name": "digits", "options": DIGITS[cell.network]}
    else:
        files = {part: str(data / f"cifar10-{part}.parquet") for part in ("train", "test")}
        task = {"name": "images", "options": {**files, "size": 16, "limit": 2500, "test_limit": 1000}}
        task["options"].update(CIFAR[cell.network])
    train: dict[str, Any] = {
        "initialisation": cell.start,
        "steps_per_round": STEPS[cell.network.partition("-")[0]],
        "batch_size": 64,
        "optimizer": {"name": "adam", "lr": 2e-3},
    }
    if cell.start == "own":
        train["first_round_epochs"] = 5
    alone, (combine, _, moments) = cell.combine == ALONE, cell.combine.partition(", moments ")
    if moments:
        train["optimizer_state"] = moments
    results = run_simulation(
        {
            "run": "-".join((cell.network, cell.split, cell.start, cell.combine, str(cell.seed))),
            "seed": cell.seed,
            "topology": {"graph": "ring", "agents": 5},
            "task": {**task, "partition": SPLITS[cell.split]},
            "train": train,
            "merge": {"method": ALONE} if alone else {"method": "dimat", "combine": combine},
            "schedule": {"rounds": rounds},
            "simulate": {"workers": 1, "evaluate": "after"},
        }
    )
    curve = results.after_merge()
    return Outcome(curve[0], curve[-1], results.mb_sent_per_agent, time.process_time() - began)


def run_all(cells: Sequence[Cell], data: Path, rounds: int, workers: int) -> dict[Cell, Outcome]:
    """Run all, side by side, saying how far it is."""
    found: dict[Cell, Outcome] = {}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(run, cell, data, rounds): cell for cell in cells}
        for job in as_completed(jobs):
            cell, outcome = jobs[job], job.result()
            found[cell] = outcome
            print(f"{len(found)}/{len(cells)} {cell}: {outcome.last:.3f}, {outcome.cpu_s:.0f} s", file=sys.stderr)
    return found


def deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def main() -> int:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the CIFAR-10 parquet files")
    parser.add_argument("--networks", nargs="+", choices=(*DIGITS, *CIFAR), default=[*DIGITS, "cifar-cnn"])
    parser.add_argument("--combine", nargs="+", default=[*COMBINE], metavar="NAME")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=[*SPLITS])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=[*STARTS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10, help="merges (default 10)")
    parser.add_argument("--workers", type=int, default=min(default_workers(), 8), help="runs side by side")
    given = parser.parse_args()
    networks, splits, starts, seeds, rounds = given.networks, given.splits, given.starts, given.seeds, given.rounds
    if given.quick:
        networks, splits, starts, seeds, rounds = ["digits-mlp"], ["dirichlet-0.5"], ["shared"], 1, 2
    if not (given.data / "cifar10-train.parquet").exists():
        left_out = [name for name in networks if name in CIFAR]
        networks = [name for name in networks if name not in CIFAR]
        if left_out:
            print(f"no cifar10-train.parquet in {given.data}: without {', '.join(left_out)}", file=sys.stderr)
    rows = [ALONE, *given.combine]
    columns = [(network, start, split) for network in networks for start in starts for split in splits]
    cells = [Cell(n, split, start, row, seed) for n, start, split in columns for row in rows for seed in range(seeds)]
    found = run_all(cells, given.data.resolve(), rounds, given.workers)

    ahead: dict[str, int] = dict.fromkeys(given.combine, 0)
    for network in networks:
        for start in starts:
            print(f"\n{network}, {start} start: accuracy after merge 1 and {rounds}")
            lines: list[list[str]] = []
            lasts: dict[tuple[str, str], list[float]] = {}
            for row in rows:
                line, runs = [row], list[Outcome]()
                for split in splits:
                    mine = [found[Cell(network, split, start, row, seed)] for seed in range(seeds)]
                    lasts[row, split] = last = [outcome.last for outcome in mine]
                    line.append(f"{fmean(o.first for o in mine):.3f}  {fmean(last):.3f} ± {deviation(last):.3f}")
                    runs += mine
                lines.append([*line, f"{fmean(o.mb for o in runs):.2f}", f"{fmean(o.cpu_s for o in runs):.1f}"])
            table(("", *splits, "MB", "CPU-s"), lines)
            for row in given.combine:
                for split in splits:
                    ours, base = lasts[row, split], lasts.get((DEFAULT, split), [0.0])
                    ahead[row] += fmean(ours) - fmean(base) > max(deviation(ours), deviation(base))
    print(f"\nCells of {len(columns)} in which a method is ahead of `{DEFAULT}` by more than the larger deviation:")
    table(("method", "cells"), list(ahead.items()))
    best = max((count for name, count in ahead.items() if name != DEFAULT), default=0)
    share = best / len(columns)
    finish(Result("default_combine", best, len(columns), share, "no other method is ahead in most cells", share <= 0.5))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
