"""Accuracy after each merge on CIFAR-10 at 16×16 pixels: five agents on a ring, 500 images each.

Every row starts from step 0, and each agent takes 16 steps before each merge: two epochs of an even part, and equally
many whatever its part's size. "all-data" is the ceiling, one model that takes two epochs of all data, 80 steps, in
the same time. All agents of a row begin with the same weights, unless it says "own-starts". "plain" is cross-entropy,
else the loss is "auto": logit-adjusted where an agent's classes are skewed. "dimat" is the default, which merges
optimizer moments too (int8); "dimat-2-steps" and "dimat-3-steps" have `schedule.mixing_steps` of 2 and 3 and send
weights as bf16, "-average" averages linear layers too, "-head" also `merge.repair = "head"`, "-kept"
`train.optimizer_state = "kept"`. D-PSGD merges after every step and is measured every 16 steps. Three seeds, no run
left out. Needs cifar10-train.parquet and cifar10-test.parquet (Hugging Face's image layout) in --data.

Reference: D-PSGD with the same loss on Dirichlet 0.5 after 12 merges; target: three mixing steps are 2.5 points above
it, at no more than half its bytes. All marks are listed with whether they are met.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _common import CACHE, DATA, Result, finish, options, table

from dimat.config import ExperimentConfig, PartitionConfig, VariantConfig, build
from dimat.results import MethodCurve
from dimat.simulate.compare import cases_of, compare
from dimat.ui.terminal.run import ConsoleListener

IMAGES, TESTS, AGENTS, BATCH, EPOCHS = 2500, 1000, 5, 64, 2
STEPS = EPOCHS * -(-IMAGES // AGENTS // BATCH)
"""Optimizer steps of an agent in a round."""
SHOWN = (1, 3, 5, 8, 12, 24, 48)
SPLITS = {
    "dirichlet-0.5": PartitionConfig(kind="dirichlet", alpha=0.5),
    "iid": PartitionConfig(kind="iid"),
    "dirichlet-0.1": PartitionConfig(kind="dirichlet", alpha=0.1),
    "two-classes": PartitionConfig(kind="classes", classes_per_agent=2),
}
DEFAULT, ALONE, DPSGD, CEILING = "dimat", "isolated", "d-psgd", "all-data"
LEAN, MIXED, HEAD, KEPT = "dimat-2-steps", "dimat-3-steps", "dimat-3-steps-head", "dimat-kept"
HEAD_KEPT, AVERAGED = "dimat-3-steps-head-kept", "dimat-2-steps-average"
FIXED = {"dirichlet-0.1": 0.42, "two-classes": 0.34}
PLAIN: dict[str, Any] = {"train": {"loss": "task"}}
LIGHT: dict[str, Any] = {"exchange": {"encoding": "bf16"}}


def forms(rounds: int) -> dict[str, dict[str, Any]]:
    """Return the rows of the table that are more than a method: by name, what differs from the experiment."""
    every_step: dict[str, Any] = {
        "merge": {"method": "dpsgd"},
        "train": {"steps_per_round": 1},
        "schedule": {"rounds": rounds * STEPS},
        "simulate": {"evaluate_every": STEPS},
    }
    return {
        LEAN: {"schedule": {"mixing_steps": 2}, **LIGHT},
        MIXED: {"schedule": {"mixing_steps": 3}, **LIGHT},
        HEAD: {"schedule": {"mixing_steps": 3}, "merge": {"repair": "head"}, **LIGHT},
        AVERAGED: {"schedule": {"mixing_steps": 2}, "merge": {"combine": "average"}, **LIGHT},
        HEAD_KEPT: {
            "schedule": {"mixing_steps": 3},
            "merge": {"repair": "head"},
            "train": {"optimizer_state": "kept"},
            **LIGHT,
        },
        KEPT: {"train": {"optimizer_state": "kept"}},
        "average-shared": {"merge": {"method": "average"}},
        "average-shared-plain": {"merge": {"method": "average"}, **PLAIN},
        "dimat-own-starts": {"train": {"initialisation": "own"}},
        "isolated-plain": {"merge": {"method": "isolated"}, **PLAIN},
        DPSGD: every_step,
        "d-psgd-plain": {**every_step, "train": {"steps_per_round": 1, "loss": "task"}},
        CEILING: {"merge": {"method": "centralised"}, "train": {"steps_per_round": EPOCHS * -(-IMAGES // BATCH)}},
    }


def experiment(data: Path, rounds: int, images: int, tests: int, model: str, size: int) -> ExperimentConfig:
    """Return the experiment that all rows are forms of."""
    task = {
        "name": "images",
        "options": {
            "train": str(data / "cifar10-train.parquet"),
            "test": str(data / "cifar10-test.parquet"),
            "model": model,
            "width": 16 if model == "cnn" else 1,
            "size": size,
            "limit": images,
            "test_limit": tests,
        },
    }
    tree = {
        "run": "cifar",
        "topology": {"graph": "ring", "agents": AGENTS},
        "task": task,
        "train": {
            "steps_per_round": STEPS,
            "batch_size": BATCH,
            "optimizer": {"name": "adam", "lr": 2e-3},
        },
        "schedule": {"rounds": rounds},
        "simulate": {"evaluate": "after"},
        "variants": [VariantConfig(name=name, set=change) for name, change in forms(rounds).items()],
        "folder": "/",
    }
    return build(ExperimentConfig, tree, "the benchmark")


def at(curve: MethodCurve, merge: int) -> float:
    """Return the mean accuracy after a merge, NaN beyond the last."""
    return curve.after_merge[merge - 1] if merge <= len(curve.after_merge) else float("nan")


def show(heading: str, curves: Mapping[str, MethodCurve], merges: Sequence[int]) -> None:
    """Print the table of a split, with the deviation over seeds after the last merge."""
    print(f"\n{heading}: accuracy after a merge")
    last = merges[-1]
    rows = [
        (
            name,
            *(f"{at(curve, merge):.3f}" for merge in merges[:-1]),
            f"{at(curve, last):.3f} ± {curve.std[last - 1]:.3f}" if last <= len(curve.std) else "-",
            f"{curve.mb_sent_per_agent:.1f}",
        )
        for name, curve in curves.items()
    ]
    table(("", *(f"{merge}" for merge in merges), "MB an agent"), rows)


def marks(splits: Mapping[str, Mapping[str, MethodCurve]], last: int) -> list[tuple[str, str, str, bool]]:
    """Return what the default, with and without mixing steps, is held against: (mark, measured, bar, met)."""
    found: list[tuple[str, str, str, bool]] = []

    def mark(what: str, measured: float, bar: float) -> None:
        found.append((what, f"{measured:.3f}", f">= {bar:.3f}", measured >= bar))

    for split, curves in splits.items():
        alone, every, ceiling = curves[ALONE], curves[DPSGD], curves[CEILING]
        for name in (DEFAULT, LEAN, MIXED, HEAD):
            ours = curves[name]
            worst = min(a - b for a, b in zip(ours.after_merge, alone.after_merge, strict=True))
            mark(f"{split}, {name}: the worst merge against isolated", worst, -0.01)
            mark(f"{split}, {name}: D-PSGD with the same loss", at(ours, last), at(every, last))
            mark(f"{split}, {name}: all data less 6 points", at(ours, last), at(ceiling, last) - 0.06)
            if split in FIXED:
                mark(f"{split}, {name}", at(ours, last), FIXED[split])
    skewed = splits["dirichlet-0.5"]
    lean, every = skewed[LEAN], skewed[DPSGD]
    mark("dirichlet-0.5, dimat-2-steps: D-PSGD less .5 points", at(lean, last), at(every, last) - 0.005)
    share = lean.mb_sent_per_agent / every.mb_sent_per_agent
    found.append(("  at a share of its bytes of", f"{share:.3f}", "<= 0.100", share <= 0.1))
    return found


def main() -> int:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the CIFAR-10 parquet files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=12, help="merges (default 12)")
    parser.add_argument("--model", choices=("cnn", "resnet20"), default="cnn")
    parser.add_argument("--size", type=int, default=16, help="pixels square (default 16)")
    parser.add_argument("--splits", default=",".join(SPLITS), help="of " + ", ".join(SPLITS))
    parser.add_argument("--rows", default="", help="only these rows, of those printed (default all)")
    arguments = parser.parse_args()
    if not (arguments.data / "cifar10-train.parquet").exists():
        print(f"no cifar10-train.parquet in {arguments.data}; name its folder with --data", file=sys.stderr)
        return 5
    quick = arguments.quick
    rounds = 2 if quick else arguments.rounds
    images, tests = (300, 100) if quick else (IMAGES, TESTS)
    base = experiment(arguments.data.resolve(), rounds, images, tests, arguments.model, arguments.size)
    splits = {name: SPLITS[name] for name in (arguments.splits.split(",") if not quick else ["dirichlet-0.5"])}
    rows = arguments.rows.split(",") if arguments.rows else [DEFAULT, ALONE, *forms(rounds)]
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch, ConsoleListener(sys.stderr) as console:
        cases = cases_of(base, rows, splits, range(1 if quick else arguments.seeds), Path(scratch))
        comparison = compare(cases, Path(scratch), listeners=[console]).comparison
    merges = [merge for merge in SHOWN if merge <= rounds]
    if merges[-1] != rounds:
        merges.append(rounds)
    for split, curves in comparison.splits.items():
        show(split, curves, merges)
    if arguments.rows or "dirichlet-0.5" not in comparison.splits:
        return 0
    print("\nWhat the default is held against:")
    table(
        ("mark", "measured", "bar", "met"),
        [(*m[:3], "yes" if m[3] else "NO") for m in marks(comparison.splits, rounds)],
    )
    skewed = comparison.splits["dirichlet-0.5"]
    ours, reference = skewed[MIXED], skewed[DPSGD]
    measured, bar = at(ours, rounds), at(reference, rounds)
    enough = measured >= bar + 0.025 and ours.mb_sent_per_agent <= 0.5 * reference.mb_sent_per_agent
    target = ">= reference + 0.025 at <= half its bytes"
    finish(Result("accuracy_cifar", measured, bar, measured / bar, target, enough))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
