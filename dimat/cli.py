"""The command line: each command parses, calls one function and prints.

Results go to stdout, everything for a person to stderr. Heavy modules (torch above all) are imported inside the
commands, so that `dimat --help` answers at once.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Group, Parameter, validators

from dimat import __version__
from dimat.errors import ConfigError, DataError, DimatError

if TYPE_CHECKING:
    from dimat.config import ExperimentConfig
    from dimat.simulate.compare import Case
    from dimat.ui.console import ConsoleListener

app = App(
    name="dimat",
    help="Train, align and merge neural networks among peers, without a server.",
    version=f"dimat {__version__}",
    help_on_error=False,
)
topology = App(name="topology", help="Graphs, schedules and mixing weights.")
symmetry = App(name="symmetry", help="Which axes of a model's tensors move together.")
app.command(topology)
app.command(symmetry)
_OPTIONS = Group("Options")
app["--help"].group = _OPTIONS
app["--version"].group = _OPTIONS

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON object on stdout.")]
Overrides = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set",
        negative="",
        consume_multiple=False,
        help="Set a key of the experiment, e.g. --set train.optimizer.lr=0.01. Repeatable.",
    ),
]
Out = Annotated[Path | None, Parameter(help="Folder for results.")]
AtLeastOne = validators.Number(gte=1)
Workers = Annotated[
    int | None,
    Parameter(validator=AtLeastOne, help="Worker processes; default: one per core. Results do not depend on it."),
]
Overwrite = Annotated[bool, Parameter(negative="", help="Replace results of the same experiment.")]
Quiet = Annotated[bool, Parameter(negative="", help="No progress, only results and warnings.")]


@app.command
def demo(
    *,
    quick: Annotated[bool, Parameter(negative="", help="One seed, fewer rounds: under 20 seconds.")] = False,
    seeds: Annotated[
        int, Parameter(validator=AtLeastOne, help="Runs per method and split; the table is their mean.")
    ] = 3,
    out: Out = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Five agents on a ring learn handwritten digits: alone, averaged, aligned and merged, side by side."""
    from dimat.simulate.demo import demo_cases

    folder = out or Path("runs/demo-quick" if quick else "runs/demo")
    # its own default folder may be replaced: the same command gives the same runs
    cases = demo_cases(folder, quick=quick, seeds=seeds)
    return _compare(cases, folder, workers, overwrite or out is None, quiet, as_json, pages=not quick)


@app.command
def init(
    file: Annotated[Path, Parameter(help="File to write.")] = Path("experiment.toml"),
    /,
    *,
    force: Annotated[bool, Parameter(negative="", help="Replace an existing file.")] = False,
) -> int:
    """Write an experiment file that works, with the settings that one changes first."""
    from dimat.simulate.starter import write_starter

    write_starter(file, force=force)
    _say(f"wrote {file}; run it with: dimat simulate {file}")
    return 0


@app.command
def simulate(
    file: Annotated[Path | None, Parameter(help="Experiment file (TOML).")] = None,
    /,
    *,
    set_: Overrides = (),
    compare: Annotated[
        str | None,
        Parameter(
            help="Methods, or variants of the file, to run side by side, e.g. average,dimat; all = all variants."
        ),
    ] = None,
    seeds: Annotated[
        int, Parameter(validator=AtLeastOne, help="With --compare: runs per method, seeds counted up from the file's.")
    ] = 1,
    out: Out = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
    replay: Annotated[
        Path | None,
        Parameter(
            help="Instead of FILE: folder of a run with a trace (simulate.trace). Does this dimat still do the same?"
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Simulate an experiment on this host: real training, real merging, a network in virtual time."""
    from dimat.config import load_experiment

    if replay is not None:
        if file is not None or set_ or compare is not None or out is not None:
            raise ConfigError("--replay takes the experiment of its run; leave out FILE, --set, --compare and --out")
        return _replay(replay, as_json)
    if file is None:
        raise ConfigError("simulate needs an experiment file, or --replay RUN_DIR (see --help)")
    if not file.exists():
        raise ConfigError(f"no experiment file {file}; write one with: dimat init {file}")
    config = load_experiment(file, set_)
    folder = out or Path("runs") / (config.run if compare is None else f"{config.run}-compared")
    if compare is None and seeds != 1:
        raise ConfigError("--seeds goes with --compare; one run's seed is set with --set seed=N")
    if compare is not None:
        from dimat.simulate.compare import cases_of

        chosen = range(config.seed, config.seed + seeds)
        names = list(dict.fromkeys(name.strip() for name in compare.split(",") if name.strip()))
        cases = cases_of(config, names, {config.task.partition.kind: config.task.partition}, chosen, folder)
        return _compare(cases, folder, workers, overwrite, quiet, as_json)
    return _simulate(config, folder, workers, overwrite, quiet, as_json)


@app.command
def report(
    run_dir: Annotated[Path, Parameter(help="Folder of a finished run.")],
    /,
) -> int:
    """Write tables, pictures and a self-contained HTML page into a run folder."""
    from dimat.ui.console import ConsoleListener
    from dimat.ui.report import write_report

    with ConsoleListener() as console:
        files = write_report(run_dir, console)
    _say(f"wrote {len(files)} files; open {run_dir / 'report.html'}")
    return 0


@app.command
def evaluate(
    weights: Annotated[Path, Parameter(help="Weights (safetensors), e.g. runs/digits-ring/final/agent-0.safetensors.")],
    /,
    *,
    task: Annotated[
        str | None, Parameter(help="Bundled task (default: digits), `module:function` or `file.py:function`.")
    ] = None,
    file: Annotated[Path | None, Parameter(help="Experiment file to take the task from, instead of --task.")] = None,
    set_: Overrides = (),
    as_json: Json = False,
) -> int:
    """Test metrics of a weights file on a task's test data."""
    from dimat.config import load_experiment
    from dimat.simulate.evaluate import evaluate_file

    if file is not None and task is not None:
        raise ConfigError("give --task or --file, not both")
    chosen = [f"task.{'hook' if ':' in task else 'name'}={json.dumps(task)}"] if task is not None else []
    config = load_experiment(file, [*chosen, *set_])
    metrics = evaluate_file(weights, config)
    _print(metrics if as_json else "\n".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    return 0


@app.command
def merge(
    *inputs: Annotated[
        Path, Parameter(help="A recipe (TOML); or models: safetensors files, folders. The first is own.")
    ],
    method: Annotated[str | None, Parameter(help="Combine method; default: average.")] = None,
    base: Annotated[Path | None, Parameter(help="Model that deltas are taken from.")] = None,
    out: Annotated[
        Path | None, Parameter(name=["--out", "-o"], help="Where to: a name in .safetensors, or a folder.")
    ] = None,
    set_: Annotated[
        tuple[str, ...],
        Parameter(name="--set", negative="", consume_multiple=False, help="Option of the method, e.g. density=0.5."),
    ] = (),
    weights: Annotated[str | None, Parameter(help="Mixing weights, e.g. 0.5,0.3,0.2; default: equal.")] = None,
    dtype: Annotated[str | None, Parameter(help="Type to write: fp32, bf16, fp16, fp64; default: own's.")] = None,
    input_dtype: Annotated[str | None, Parameter(help="Type to read in; default: each tensor's own.")] = None,
    model: Annotated[
        str | None,
        Parameter(help="Architecture, for merges that run the models: `module:function`, `file.py:function`."),
    ] = None,
    data: Annotated[
        str | None, Parameter(help="Inputs to run the models on: a safetensors file, or a function as in --model.")
    ] = None,
    align: Annotated[
        str | None, Parameter(help="Bring units into own's order first: activations; default: none.")
    ] = None,
    repair: Annotated[str | None, Parameter(help="Re-estimate afterwards: batchnorm; default: none.")] = None,
    device: Annotated[str | None, Parameter(help="Where to merge: cpu (default), cuda, auto.")] = None,
    seed: Annotated[int | None, Parameter(help="Seed of methods that draw at random; default: 0.")] = None,
    shard_size: Annotated[str | None, Parameter(help="Bytes per file of a folder; default: 5GB.")] = None,
    from_mergekit: Annotated[Path | None, Parameter(help="Instead of INPUTS: a configuration of mergekit.")] = None,
    dry_run: Annotated[bool, Parameter(negative="", help="Check and tell what would happen; write nothing.")] = False,
    overwrite: Annotated[bool, Parameter(negative="", help="Replace a model that is there.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Merge models on disk by a recipe or from flags, tensor by tensor, without any network."""
    from dimat.merging import merge_files, prepare
    from dimat.merging.recipe import parse_weights, recipe_of
    from dimat.merging.show import plan_lines, progress_bar

    flags = {"method": method, "base": base, "out": out, "dtype": dtype, "device": device, "seed": seed}
    flags |= {"model": model, "data": data, "align": align, "repair": repair, "input_dtype": input_dtype}
    changes = {key: str(value) if isinstance(value, Path) else value for key, value in flags.items()}
    changes |= {"shard_size": shard_size, "weights": parse_weights(weights)}
    job = prepare(recipe_of(inputs, changes, set_, from_mergekit), overwrite=overwrite)
    if dry_run:
        _print(job.plan() if as_json else plan_lines(job))
        return 0
    with progress_bar(quiet) as progress:
        report = merge_files(job, version=__version__, overwrite=overwrite, progress=progress)
    if as_json:
        _print(report.to_plain())
    elif not quiet:
        for path, share in report.moved.items():
            _say(f"aligned {path}: {share:.0%} of its units moved")
        for note in report.notes:
            _say(f"note: {note}")
        _say(f"wrote {job.out}: {len(job.infos):,} tensors, {job.bytes:,} bytes")
    return 0


# ── topology ─────────────────────────────────────────────────────────────────────────────────────────────────────
Spec = Annotated[str, Parameter(help="Name of a graph (see `dimat topology list`) or a file.")]
Agents = Annotated[int | None, Parameter(name=["--agents", "-n"], help="Number of agents.")]
Options = Annotated[
    tuple[str, ...],
    Parameter(name="--set", negative="", consume_multiple=False, help="Key of [topology], e.g. options.degree=4."),
]


@topology.command(name="list")
def topology_list(*, as_json: Json = False) -> int:
    """Graphs, schedules and mixing rules, with their options."""
    from dimat.ui.topology import catalogue

    _print(catalogue(as_json=as_json))
    return 0


@topology.command(name="show")
def topology_show(
    spec: Spec,
    /,
    *,
    agents: Agents = None,
    set_: Options = (),
    draw: Annotated[Path | None, Parameter(help="Write a picture (PNG or SVG) to this file.")] = None,
    as_json: Json = False,
) -> int:
    """Degree, diameter, spectral gap, rounds to consensus and cost of a topology."""
    from dimat.ui.topology import describe, draw_topology, open_topology

    opened = open_topology(spec, agents, set_)
    if draw is not None:
        draw_topology(opened, draw)
        _say(f"wrote {draw}")
    _print(describe(opened, as_json=as_json))
    return 0


@topology.command(name="check")
def topology_check(spec: Spec, /, *, agents: Agents = None, set_: Options = ()) -> int:
    """Check that a topology can be used: connected, rows of the mixing matrix sum to 1, weights on edges only."""
    from dimat.ui.topology import check_topology, open_topology

    _say(check_topology(open_topology(spec, agents, set_)))
    return 0


@topology.command(name="export")
def topology_export(
    spec: Spec,
    file: Annotated[Path, Parameter(help="File to write; its ending tells the format.")],
    /,
    *,
    agents: Agents = None,
    set_: Options = (),
) -> int:
    """Write a topology as a file: TOML map, GraphML, GML, node-link JSON, edge list."""
    from dimat.ui.topology import export_topology, open_topology

    export_topology(open_topology(spec, agents, set_), file)
    _say(f"wrote {file}")
    return 0


# ── symmetry ─────────────────────────────────────────────────────────────────────────────────────────────────────
@symmetry.command(name="show")
def symmetry_show(
    hook: Annotated[
        str,
        Parameter(
            help="`module:function` or `file.py:function` that returns a task, or a model and its example inputs; "
            "or the name of a bundled task."
        ),
    ],
    /,
    *,
    verify: Annotated[bool, Parameter(help="Prove the groups by random permutations in float64.")] = True,
    as_json: Json = False,
) -> int:
    """Derive a model's symmetry groups and show them: sizes, tensors, observation points, what is frozen and why."""
    from dimat.ui.symmetry import show_symmetry

    _print(show_symmetry(hook, verify=verify, as_json=as_json))
    return 0


# ── helpers ──────────────────────────────────────────────────────────────────────────────────────────────────────
def _simulate(
    config: ExperimentConfig, folder: Path, workers: int | None, overwrite: bool, quiet: bool, as_json: bool
) -> int:
    from dimat.simulate.folder import RunFolder
    from dimat.simulate.run import run_scenario
    from dimat.simulate.scenario import prepare
    from dimat.ui.console import print_results
    from dimat.ui.jsonl import JsonlListener
    from dimat.ui.report import write_report

    if workers is not None:
        config = config.model_copy(update={"simulate": config.simulate.model_copy(update={"workers": workers})})
    scenario = prepare(config)
    opened = RunFolder(folder, config, overwrite=overwrite)
    with _console(quiet) as console, closing(JsonlListener(opened.events)) as log:
        results = run_scenario(scenario, opened, [console, log])
        write_report(folder, console)
    if as_json:
        _print(results.model_dump(mode="json"))
    else:
        print_results(results, sys.stdout)
        _say(f"report: {folder / 'report.html'}")
    return 130 if results.status == "stopped" else 0


def _replay(run_dir: Path, as_json: bool) -> int:
    from dimat.simulate.replay import replay_run

    found = replay_run(run_dir)
    if as_json:
        _print({"events": found.steps, "actions": found.actions, "difference": found.difference})
    else:
        same = found.difference or "all the same"
        _print(f"{found.steps:,} events, {found.actions:,} actions: {same}")
    return 1 if found.difference else 0


def _compare(
    cases: Sequence[Case],
    folder: Path,
    workers: int | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    *,
    pages: bool = True,
) -> int:
    from dimat.simulate.compare import compare
    from dimat.ui.console import print_comparison
    from dimat.ui.jsonl import JsonlListener
    from dimat.ui.report import write_comparison_report, write_report

    with _console(quiet) as console:
        outcome = compare(
            cases,
            folder,
            workers=workers,
            listeners=[console],
            log=lambda file: closing(JsonlListener(file)),
            overwrite=overwrite,
        )
        # one seed's runs get pages of their own; `dimat report` makes those of the others
        shown = {name: run for name, run in outcome.runs.items() if pages and name in outcome.first_seed}
        for run in shown.values():
            write_report(run, console)
        write_comparison_report(outcome.comparison, shown, folder, console)
    if as_json:
        _print(outcome.comparison.to_plain())
    else:
        print_comparison(outcome.comparison, sys.stdout)
        _say(f"report: {folder / 'report.html'}")
    return 0 if outcome.complete else 130


def _console(quiet: bool) -> ConsoleListener:
    from dimat.ui.console import ConsoleListener

    return ConsoleListener(sys.stderr, verbosity=-1 if quiet else 0)


def _print(value: Any) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    sys.stdout.write(text + "\n")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; faults become one line on stderr."""

    terminated = False

    def terminate(*_: object) -> None:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        code = app(
            sys.argv[1:] if arguments is None else arguments,
            exit_on_error=False,
            print_error=False,
            result_action="return_int_as_exit_code_else_zero",
        )
        return 143 if terminated else code
    except CycloptsError as error:
        _say(f"dimat: {' '.join(str(error).split())} (see --help)")
        return ConfigError.exit_code
    except DimatError as error:
        _say(f"dimat: {error}")
        return error.exit_code
    except KeyboardInterrupt as stop:
        _say(f"dimat: {stop}" if str(stop) else "dimat: stopped")
        return 143 if terminated else 130
    except BrokenPipeError:
        # whoever read our output has had enough; keep the interpreter from complaining when it flushes
        sys.stdout = None
        return 0
    except OSError as error:
        _say(f"dimat: {error}")
        return DataError.exit_code
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    raise SystemExit(main())
