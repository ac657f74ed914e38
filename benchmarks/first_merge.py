"""First merges of agents that begin with weights of their own: CIFAR-10 at 16×16 pixels, three architectures.

Five agents on a ring, 500 images each (Dirichlet 0.5), eight epochs alone, then a merge and two epochs a round; Adam
2e-3, batches of 64, skew-aware loss. "isolated" never merges. "align": `dimat` from own starts. "adopt": at the first
merge all take over the founder's weights. "adopt-distil": that, and each learns for 80 steps, half from own labels and
half from the logits of its own and its neighbours' old models; "its labels alone": the same steps without logits.
"isolated, as many steps": isolated, with the optimizer steps that "adopt-distil" took beyond the others (mean of all
agents) before the first merge. Mean test accuracy over agents after a merge, and optimizer steps an agent took in all.
Three seeds, no run left out. Needs cifar10-train.parquet and cifar10-test.parquet in --data.

Reference: after merge 1 "isolated, as many steps"; target: "adopt-distil" is no worse with any network, and no later
merge is more than 1 point below the one before. About 40 CPU-minutes.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from _common import DATA, Result, finish, options, table

from dimat.events import Event, Merged, Trained
from dimat.simulate import run_simulation
from dimat.simulate.engines.pool import default_workers

NETWORKS: Mapping[str, dict[str, Any]] = {
    "cnn": {"model": "cnn", "width": 16},
    "resnet20": {"model": "resnet20", "width": 1},
    "vit": {"model": "vit"},
}
AGENTS, IMAGES, BATCH, ALONE_EPOCHS = 5, 2500, 64, 8
ISOLATED, CONTROL, ALIGN, ADOPT, DISTIL, LABELS = (
    *("isolated", "isolated, as many steps", "align", "adopt"),
    *("adopt-distil", "adopt-distil, its labels alone"),
)
ROWS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    ISOLATED: ({"method": "isolated"}, {}),
    ALIGN: ({"method": "dimat"}, {}),
    ADOPT: ({"method": "dimat"}, {"first_merge": "adopt"}),
    DISTIL: ({"method": "dimat"}, {"first_merge": "adopt-distil"}),
    LABELS: ({"method": "dimat"}, {"first_merge": "adopt-distil", "distil": {"weight": 0.0}}),
}
"""Row → tables `merge` and `schedule`; the control follows from what "adopt-distil" took."""
TAUGHT = re.compile(r"learned for (\d+) steps")
SHOWN = (1, 2, 3, 5, 8)


@dataclass(frozen=True)
class Cell:
    """One run. `extra`: optimizer steps more before the first merge."""

    network: str
    row: str
    seed: int
    extra: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """Mean accuracy after each merge; optimizer steps of an agent, and those of them that distillation took."""

    accuracy: list[float]
    steps: float
    taught: float


class Steps:
    """Counts optimizer steps, from the events of a run."""

    def __init__(self) -> None:
        self.trained = self.taught = 0.0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Trained):
            self.trained += event.result.samples / BATCH
        if isinstance(event, Merged):
            self.taught += sum(int(found[1]) for note in event.result.notes if (found := TAUGHT.search(note)))


def run(cell: Cell, data: Path, rounds: int, images: int) -> Outcome:
    """Simulate one network."""
    merge, schedule = ROWS.get(cell.row, ROWS[ISOLATED])
    files = {part: str(data / f"cifar10-{part}.parquet") for part in ("train", "test")}
    steps = Steps()
    results = run_simulation(
        {
            "run": f"{cell.network} {cell.row} {cell.seed}",
            "seed": cell.seed,
            "topology": {"graph": "ring", "agents": AGENTS},
            "task": {
                "name": "images",
                "options": {**files, **NETWORKS[cell.network], "size": 16, "limit": images, "test_limit": 1000},
                "partition": {"kind": "dirichlet", "alpha": 0.5},
            },
            "train": {
                "initialisation": "own",
                "first_round_epochs": ALONE_EPOCHS + cell.extra * BATCH * AGENTS / images,
                "epochs_per_round": 2,
                "batch_size": BATCH,
                "optimizer": {"name": "adam", "lr": 2e-3},
            },
            "merge": merge,
            "schedule": {"rounds": rounds, **schedule},
            "simulate": {"workers": 1, "evaluate": "after"},
        },
        listeners=[steps],
    )
    return Outcome(results.after_merge(), (steps.trained + steps.taught) / AGENTS, steps.taught / AGENTS)


def run_all(cells: Sequence[Cell], data: Path, rounds: int, images: int, workers: int) -> dict[Cell, Outcome]:
    """Run all, side by side, saying how far it is."""
    found: dict[Cell, Outcome] = {}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(run, cell, data, rounds, images): cell for cell in cells}
        for job in as_completed(jobs):
            found[jobs[job]] = outcome = job.result()
            print(f"{len(found)}/{len(cells)} {jobs[job]}: {outcome.accuracy[0]:.3f}", file=sys.stderr)
    return found


def main() -> int:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the CIFAR-10 parquet files")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8, help="merges (default 8)")
    parser.add_argument("--workers", type=int, default=min(default_workers(), 8), help="runs side by side")
    given = parser.parse_args()
    if not (given.data / "cifar10-train.parquet").exists():
        print(f"no cifar10-train.parquet in {given.data}; name its folder with --data", file=sys.stderr)
        return 5
    networks, seeds, rounds, images = given.networks, range(given.seeds), given.rounds, IMAGES
    if given.quick:
        networks, seeds, rounds, images = ["cnn"], range(1), 2, 500
    place = (given.data.resolve(), rounds, images, given.workers)
    found = run_all([Cell(n, row, seed) for n in networks for row in ROWS for seed in seeds], *place)
    extra = {n: fmean(found[Cell(n, DISTIL, seed)].taught for seed in seeds) for n in networks}
    controls = {n: [Cell(n, CONTROL, seed, extra[n]) for seed in seeds] for n in networks}
    found |= run_all([cell for cells in controls.values() for cell in cells], *place)

    worst, step_down = 1.0, 0.0
    merges = [merge for merge in SHOWN if merge <= rounds]
    for network in networks:
        print(f"\n{network}, own starts: accuracy after a merge")
        lines: list[list[str]] = []
        firsts: dict[str, float] = {}
        for row in (ISOLATED, CONTROL, ALIGN, ADOPT, DISTIL, LABELS):
            cells = controls[network] if row == CONTROL else [Cell(network, row, seed) for seed in seeds]
            runs = [found[cell] for cell in cells]
            curve = [fmean(values) for values in zip(*(each.accuracy for each in runs), strict=True)]
            spread = [stdev(v) if len(v) > 1 else 0.0 for v in zip(*(each.accuracy for each in runs), strict=True)]
            firsts[row] = curve[0]
            shown = (f"{curve[merge - 1]:.3f} ± {spread[merge - 1]:.3f}" for merge in merges)
            lines.append([row, *shown, f"{fmean(each.steps for each in runs):.0f}"])
            if row == DISTIL:
                step_down = max([step_down, *(a - b for a, b in pairwise(curve))])
        table(("", *(f"{merge}" for merge in merges), "steps"), lines)
        worst = min(worst, firsts[DISTIL] - firsts[CONTROL])
    print(f"\nadopt-distil against isolated with as many steps, worst network: {worst:+.3f} after merge 1;")
    print(f"its largest step down from a merge to the next: {step_down:.3f}")
    met = worst >= 0 and step_down <= 0.01
    finish(Result("first_merge", worst, 0.0, worst, ">= 0 after merge 1, no merge over .01 below the last", met))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
