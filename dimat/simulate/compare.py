"""Methods side by side: the same agents, data parts and first trainings for each.

The first round's training is the same for all methods of one split and seed; it is done once and kept, and each
method branches off from it. Runs of different seeds proceed side by side, so that all workers are busy.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dimat.agent.setup.next_step import averages_exactly, next_step
from dimat.config import CEILING, FLOOR, PRESETS, ExperimentConfig, PartitionConfig, VariantConfig, build, changed
from dimat.errors import ConfigError, DataError, DimatError, unknown_name
from dimat.events import Event, Listener
from dimat.results import Comparison, MethodCurve, Results, mean_timeline
from dimat.simulate.engines.pool import WorkerPool, default_workers
from dimat.simulate.folder import RunFolder, check_folder
from dimat.simulate.simulation import Simulation
from dimat.simulate.world.scenario import Scenario, prepare

ALL = "all"
SIDE_BY_SIDE = 3  # runs at a time per pool: enough to even out how agents fall on workers


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One run of a comparison; two cases are equal only if they are the same object."""

    split: str
    method: str
    seed: int
    config: ExperimentConfig
    folder: Path


@dataclass(frozen=True, slots=True)
class Outcome:
    """A comparison and the folders of the runs behind it; `complete` is false if it was stopped."""

    comparison: Comparison
    runs: Mapping[str, Path]
    first_seed: frozenset[str]
    """The runs of the first seed, one for each method and split."""
    complete: bool


def cases_of(
    base: ExperimentConfig,
    names: Sequence[str],
    splits: Mapping[str, PartitionConfig],
    seeds: Sequence[int],
    out: Path,
) -> list[Case]:
    """Return the runs of a comparison: every method or variant on every split with every seed; "all" stands for all
    variants of the experiment.

    Everything else is as in `base`, except that other methods get the stages of their own presets (align, combine,
    repair). A variant with a group is compared under its group instead of the split. The ceiling holds all data in
    every split, so it runs once and counts for all.
    Raises ConfigError for a name that is neither a method nor a variant, or both, and for too many seeds.
    """
    most = base.simulate.most_seeds
    if len(seeds) > most:
        raise ConfigError(
            f"{len(seeds):,} seeds are above simulate.most_seeds = {most:,}; raise it in an experiment file"
        )
    forms = {variant.name: variant for variant in base.variants}
    clash = next((name for name in forms if name in PRESETS or name == ALL), None)
    if clash is not None:
        raise ConfigError(f"a variant is named {clash!r}, which has another meaning for --compare; rename it")
    chosen = list(dict.fromkeys(each for name in names for each in (forms if name == ALL else (name,))))
    for name in chosen:
        if name not in forms and name not in PRESETS:
            raise ConfigError(unknown_name("method or variant", name, (*PRESETS, *forms)))
    groups = [form.group for name in chosen if (form := forms.get(name)) is not None and form.group]
    cases: list[Case] = []
    for split, partition in splits.items():
        for name in chosen:
            if name == CEILING and split != next(iter(splits)):
                continue
            form = forms.get(name)
            group = form.group if form is not None else groups[0] if groups and name == CEILING else None
            heading = group or split
            tree = _form(base, partition, name if form is None else form)
            for seed in seeds:
                run = f"{heading} {name} seed {seed}"
                config = build(ExperimentConfig, {**tree, "run": run, "seed": seed}, f"the comparison's {name!r}")
                cases.append(Case(heading, name, seed, config, out / heading / name / f"seed{seed}"))
    return cases


def _form(base: ExperimentConfig, partition: PartitionConfig, form: str | VariantConfig) -> dict[str, Any]:
    """Return the tables of an experiment on a split, as a variant or with another method."""
    task = base.task.model_copy(update={"partition": partition})
    if isinstance(form, VariantConfig):
        plain = base.model_copy(update={"task": task}).model_dump(exclude_unset=True, exclude={"variants"})
        return {**changed(plain, form.set), "folder": base.folder}
    merge = base.merge
    if form != merge.method:
        stages = dict.fromkeys(("align", "align_to", "combine", "repair"))
        merge = merge.model_copy(update={"method": form, **stages})
    return {**dict(base), "task": task, "merge": merge, "variants": ()}


def compare(
    cases: Sequence[Case],
    out: Path,
    *,
    workers: int | None = None,
    listeners: Sequence[Listener] = (),
    log: Callable[[Path], AbstractContextManager[Listener]] | None = None,
    overwrite: bool = False,
) -> Outcome:
    """Run all cases and return their comparison.

    Ctrl-C ends it with the runs that are complete; if none is, KeyboardInterrupt is raised. `log`: opens a listener
    that writes one run's own events to a file.
    """
    if not cases:
        raise ConfigError("nothing to compare: name at least one method and one seed")
    scenarios = {case: prepare(case.config) for case in cases}  # whatever is impossible is refused before any work
    for case in cases:
        check_folder(case.folder, case.config, overwrite=overwrite)
    agents = max(len(scenario.agents) for scenario in scenarios.values())
    together = min(SIDE_BY_SIDE, len(cases))
    size = min(workers or cases[0].config.simulate.workers or default_workers(), agents * together)
    if size == 1:
        together = 1  # with one worker everything happens in this process, one thing at a time
    tell = _serialised(listeners)
    done: dict[Case, Results] = {}
    complete = True

    def run(case: Case, simulation: Simulation, folder: RunFolder) -> Results:
        with log(folder.events) if log is not None else nullcontext() as own:
            if own is not None:
                simulation.listeners.append(own)
            try:
                return simulation.run()
            except DimatError as error:
                raise type(error)(f"{case.config.run}: {error}") from error

    with _warm_folder(out) as warm, WorkerPool(size) as pool, ThreadPoolExecutor(together) as threads:
        running: dict[Future[Results], tuple[Case, Simulation]] = {}
        waiting = list(cases)
        try:
            while waiting or running:
                while waiting and len(running) < together:
                    case = waiting.pop(0)
                    folder = RunFolder(case.folder, case.config, overwrite=overwrite)
                    simulation = Simulation(scenarios[case], folder, pool, tell, warm)
                    if together == 1:
                        done[case] = run(case, simulation, folder)
                        if done[case].status != "done":
                            raise KeyboardInterrupt
                    else:
                        running[threads.submit(run, case, simulation, folder)] = (case, simulation)
                finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED) if running else (set(), None)
                for future in finished:
                    case, _ = running.pop(future)
                    done[case] = future.result()
        except KeyboardInterrupt:
            complete = False
        finally:
            for _, simulation in running.values():
                simulation.stop()
            if running:
                pool.terminate()
    finished_runs = {case: results for case, results in done.items() if results.status == "done"}
    if not finished_runs:
        raise KeyboardInterrupt("stopped before the first run was complete; each run's folder keeps its rounds")
    runs = {case.config.run: case.folder for case in finished_runs}
    first = frozenset(case.config.run for case in finished_runs if case.seed == cases[0].seed)
    return Outcome(summarise(finished_runs, scenarios), runs, first, complete)


def summarise(done: Mapping[Case, Results], scenarios: Mapping[Case, Scenario]) -> Comparison:
    """Return mean and standard deviation over seeds of each method's curve on each split; `scenarios`: by case."""
    curves: dict[tuple[str, str], list[tuple[int, Results]]] = {}
    worlds = {(case.split, case.method): scenarios[case] for case in done}
    for case, results in done.items():
        curves.setdefault((case.split, case.method), []).append((case.seed, results))
    splits: dict[str, dict[str, MethodCurve]] = {}
    for (split, method), runs in curves.items():
        rows = [results.after_merge() for _, results in runs]
        columns = list(zip(*rows, strict=False))  # runs that end by the clock differ in how many rounds they have
        means = [sum(column) / len(column) for column in columns]
        splits.setdefault(split, {})[method] = MethodCurve(
            after_merge=means,
            std=[
                (sum((v - mean) ** 2 for v in column) / max(len(column) - 1, 1)) ** 0.5
                for mean, column in zip(means, columns, strict=True)
            ],
            mb_sent_per_agent=sum(results.mb_sent_per_agent for _, results in runs) / len(runs),
            seeds=[seed for seed, _ in runs],
            curves=rows,
            timeline=mean_timeline([results.timeline() for _, results in runs]),
            unlike=_unlike(runs[0][1], curves.get((split, FLOOR), runs)[0][1]),
            next_step=_next_step(worlds[split, method]),
        )
    ceiling = next((methods[CEILING] for methods in splits.values() if CEILING in methods), None)
    if ceiling is not None:
        splits = {split: {**methods, CEILING: ceiling} for split, methods in splits.items()}
    metric = next(iter(done.values())).metric
    return Comparison(metric=metric, splits=splits)


def _unlike(one: Results, floor: Results) -> list[str]:
    """Return the settings of training in which two runs differ, so that the first cannot measure the other's merges.

    The initialisation and the merging of optimizer states make no difference to agents that train alone; rounds of
    different lengths are compared by their total epochs or steps.
    """
    pair = [_training(results.config) for results in (one, floor)]
    return sorted(key for key in {*pair[0], *pair[1]} if pair[0].get(key) != pair[1].get(key))


def _training(plain: Mapping[str, Any]) -> dict[str, object]:
    train: dict[str, Any] = dict(plain["train"])
    rounds = plain["schedule"]["rounds"]
    epochs, steps, first = (train.pop(key) for key in ("epochs_per_round", "steps_per_round", "first_round_epochs"))
    for key in ("initialisation", "optimizer_state", "eval_batch_size"):
        del train[key]
    total: tuple[object, ...] = (steps * rounds, first) if steps is not None else _epochs(epochs or 2.0, first, rounds)
    task = {f"task.{key}": value for key, value in plain["task"].items()}
    return {**{f"train.{key}": value for key, value in train.items()}, **task, "epochs or steps in all": total}


def _epochs(epochs: float, first: float | None, rounds: int) -> tuple[object, ...]:
    return (round((epochs if first is None else first) + epochs * (rounds - 1), 9),)


def _next_step(scenario: Scenario) -> str:
    exact = averages_exactly(scenario.schedule.first)
    return next_step(scenario.config, scenario.histogram, sparse=scenario.sparse, exact=exact)


def _serialised(listeners: Sequence[Listener]) -> list[Listener]:
    """Passes events from the runs' threads to the listeners, one at a time."""
    lock = threading.Lock()

    def tell(event: Event) -> None:
        with lock:
            for listener in listeners:
                listener(event)

    return [tell]


@contextmanager
def _warm_folder(out: Path) -> Generator[Path]:
    # a fresh one each time: what a task's code or data were when an older one was filled, nobody knows
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".first-rounds-", dir=out))
    except OSError as error:
        raise DataError(f"cannot write to {out}: {error.strerror or error}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
