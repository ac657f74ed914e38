"""Accuracy of agents with unlike models that learn from each other's logits (`merge.method = "distil"`).

Five agents on a ring, Dirichlet 0.5: two convolutional networks, two vision transformers and an MLP, on digits or on
CIFAR-10 at 16×16 pixels (`--task cifar`, files in --data). Each takes 16 steps before each exchange, whatever its
part's size, and "distil" 80 more in it, by the method's defaults; "alone, all steps" is training alone with as many
steps of own labels in their place. Accuracy by model after the last exchange, and for how many agents of how many
seeds "distil" is 3 points above both. No run left out.

Reference: training alone with as many steps; target: no agent less than 3 points above training alone.
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from _common import CACHE, DATA, Result, finish, options, table

from dimat.config import ExperimentConfig, PartitionConfig, VariantConfig, build
from dimat.results import read_results
from dimat.simulate.compare import cases_of, compare
from dimat.ui.terminal.run import ConsoleListener

AGENTS, STEPS, TAUGHT = 5, 16, 80
MARGIN = 0.03
ALONE, CONTROL, OURS = "isolated", "alone-all-steps", "distil"
MODELS = (
    {"agents": ["agent-1", "agent-3"], "options": {"model": "vit"}},
    {"agents": ["agent-4"], "options": {"model": "mlp"}},
)
SPLIT = PartitionConfig(kind="dirichlet", alpha=0.5)


def forms() -> dict[str, dict[str, Any]]:
    """Return the rows that are more than a method: by name, what differs from the experiment."""
    few = {"combine": {"name": "distil", "options": {"keep": 3}}}
    return {
        CONTROL: {"merge": {"method": "isolated"}, "train": {"steps_per_round": STEPS + TAUGHT}},
        "distil-keep-3": {"merge": {"method": "distil", **few}},
    }


def experiment(task: str, data: Path, rounds: int, probe: int, model: str, *, quick: bool) -> ExperimentConfig:
    """Return the experiment that all rows are forms of. `probe`: examples of the probe set; `model`: of two agents."""
    given: dict[str, Any] = {"probe": probe, "model": model}
    if task == "cifar":
        given |= {"train": str(data / "cifar10-train.parquet"), "test": str(data / "cifar10-test.parquet"), "size": 16}
        given |= {"limit": 300 if quick else 2500, "test_limit": 100 if quick else 1000}
        given |= {"width": 16} if model == "cnn" else {}
    models = [{**each, "options": {"width": None, **each["options"]}} for each in MODELS]
    tree = {
        "run": "unlike",
        "topology": {"graph": "ring", "agents": AGENTS},
        "task": {"name": "images" if task == "cifar" else task, "options": given, "models": models},
        "train": {"steps_per_round": STEPS},
        "merge": {"method": OURS},
        "schedule": {"rounds": rounds},
        "simulate": {"evaluate": "after"},
        "variants": [VariantConfig(name=name, set=change) for name, change in forms().items()],
        "folder": "/",
    }
    return build(ExperimentConfig, tree, "the benchmark")


def by_agent(folder: Path) -> dict[str, float]:
    """Return each agent's accuracy after the last exchange of a run."""
    rows = read_results(folder).rows
    last = max(row.round for row in rows)
    return {row.agent: row.after or 0.0 for row in rows if row.round == last}


def show(found: Mapping[str, Mapping[int, Mapping[str, float]]], sent: Mapping[str, float], model: str) -> None:
    """Print accuracy by model, mean over agents and seeds ± deviation of seeds' means. `found`: by row, seed, agent."""
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for k in range(AGENTS):
        agent = f"agent-{k}"
        kinds[next((each["options"]["model"] for each in MODELS if agent in each["agents"]), model)].append(agent)
    kinds["all"] = [f"agent-{k}" for k in range(AGENTS)]
    cells: list[list[str]] = []
    for row, seeds in found.items():
        means = {kind: [mean(run[agent] for agent in names) for run in seeds.values()] for kind, names in kinds.items()}
        spread = (f"{mean(m):.3f} ± {stdev(m) if len(m) > 1 else 0:.3f}" for m in means.values())
        cells.append([row, *spread, f"{min(min(run.values()) for run in seeds.values()):.3f}", f"{sent[row]:.2f}"])
    table(("", *kinds, "worst agent", "MB an agent"), cells)


def main() -> int:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("digits", "cifar"), default="digits")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the CIFAR-10 parquet files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--rounds", type=int, default=10, help="exchanges (default 10)")
    parser.add_argument("--probe", type=int, default=0, help="probe examples (default 300, of CIFAR-10 1,000)")
    parser.add_argument("--model", default="", help="of the two convolutional agents (default cnn)")
    parser.add_argument("--rows", default="", help="only these rows (default all)")
    arguments = parser.parse_args()
    task, quick = arguments.task, arguments.quick
    if task == "cifar" and not (arguments.data / "cifar10-train.parquet").exists():
        print(f"no cifar10-train.parquet in {arguments.data}; name its folder with --data", file=sys.stderr)
        return 5
    probe, model = arguments.probe or (300 if task == "digits" else 1000), arguments.model or "cnn"
    base = experiment(task, arguments.data.resolve(), 2 if quick else arguments.rounds, probe, model, quick=quick)
    rows = arguments.rows.split(",") if arguments.rows else [ALONE, CONTROL, OURS, *list(forms())[1:]]
    seeds = range(arguments.first, arguments.first + (1 if quick else arguments.seeds))
    CACHE.mkdir(exist_ok=True)
    found: defaultdict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch, ConsoleListener(sys.stderr) as console:
        cases = cases_of(base, rows, {"dirichlet-0.5": SPLIT}, seeds, Path(scratch))
        curves = compare(cases, Path(scratch), listeners=[console]).comparison.splits["dirichlet-0.5"]
        for case in cases:
            found[case.method][case.seed] = by_agent(case.folder)
    show(found, {row: curve.mb_sent_per_agent for row, curve in curves.items()}, model)
    if not {ALONE, CONTROL, OURS} <= found.keys():
        return 0
    ours = found[OURS]
    for row in (ALONE, CONTROL):
        gains = [ours[seed][agent] - run[agent] for seed, run in found[row].items() for agent in run]
        above = sum(gain >= MARGIN for gain in gains)
        print(f"{OURS} against {row}: {above} of {len(gains)} agents 3 points above; least {min(gains):+.3f}")
    least = min(ours[seed][agent] - run[agent] for seed, run in found[ALONE].items() for agent in run)
    overall = {row: mean(mean(run.values()) for run in found[row].values()) for row in (OURS, CONTROL)}
    target = "each agent >= 3 points above training alone"
    ratio = overall[OURS] / overall[CONTROL]
    finish(Result("accuracy_unlike", overall[OURS], overall[CONTROL], ratio, target, least >= MARGIN))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
