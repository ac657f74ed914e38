"""Commands for experiments: `demo`, `init`, `simulate`, `report`, `evaluate`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from dimat.cli.app import app
from dimat.cli.shared import AtLeastOne, Json, Out, Overrides, Overwrite, Quiet, Workers, open_console, say, show
from dimat.errors import ConfigError, SecurityError

if TYPE_CHECKING:
    from dimat.config import ExperimentConfig
    from dimat.simulate.compare import Case


@app.command
def demo(
    *,
    quick: Annotated[bool, Parameter(negative="", help="Use one seed and fewer rounds: under 20 seconds.")] = False,
    seeds: Annotated[
        int, Parameter(validator=AtLeastOne, help="Runs per method and split; the table shows their mean.")
    ] = 3,
    out: Out = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Compare several methods side by side: five agents on a ring learn handwritten digits."""
    from dimat.simulate.demo import demo_cases

    folder = out or Path("runs/demo-quick" if quick else "runs/demo")
    # its own default folder may be replaced: the same command gives the same runs
    cases = demo_cases(folder, quick=quick, seeds=seeds)
    return _compare(cases, folder, workers, overwrite or out is None, quiet, as_json, pages=not quick)


@app.command
def init(
    path: Annotated[
        Path | None,
        Parameter(help="File to write (default: experiment.toml); with --agents, a folder (default: network)."),
    ] = None,
    /,
    *,
    task: Annotated[
        str, Parameter(help="Bundled task: digits, images, hf-image-classification or hf-causal-lm.")
    ] = "digits",
    agents: Annotated[
        int | None,
        Parameter(help="Write the map, configuration and keys of this many real agents on this host instead."),
    ] = None,
    force: Annotated[bool, Parameter(negative="", help="Replace existing files.")] = False,
) -> int:
    """Write an experiment file that runs as it is, or with --agents the files of a network of agents."""
    if agents is not None:
        return _init_network(path or Path("network"), agents, task, force)
    from dimat.cli.templates.experiment_template import write_starter

    file = path or Path("experiment.toml")
    write_starter(file, task=task, force=force)
    say(f"wrote {file}; run it with: dimat simulate {file}")
    return 0


@app.command
def simulate(
    file: Annotated[Path | None, Parameter(help="Experiment file (TOML).")] = None,
    /,
    *,
    set_: Overrides = (),
    compare: Annotated[
        str | None,
        Parameter(help="Methods, or the file's variants, to run side by side, e.g. average,dimat; all = all variants."),
    ] = None,
    seeds: Annotated[
        int,
        Parameter(validator=AtLeastOne, help="With --compare: runs per method; seeds count up from the file's seed."),
    ] = 1,
    out: Out = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
    replay: Annotated[
        Path | None,
        Parameter(
            help="Instead of FILE: a run's folder with a trace (simulate.trace); check that this dimat does the same."
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Simulate an experiment on this host: real training and merging in virtual time."""
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
        raise ConfigError("--seeds goes with --compare; set the seed of a single run with --set seed=N")
    if compare is not None:
        from dimat.simulate.compare import cases_of

        chosen = range(config.seed, config.seed + seeds)
        names = list(dict.fromkeys(name.strip() for name in compare.split(",") if name.strip()))
        cases = cases_of(config, names, {config.task.partition.kind: config.task.partition}, chosen, folder)
        return _compare(cases, folder, workers, overwrite, quiet, as_json)
    return _simulate(config, folder, workers, overwrite, quiet, as_json)


@app.command
def report(
    run_dir: Annotated[Path, Parameter(help="Folder of a finished run, or of an agent.")],
    /,
    *,
    verify: Annotated[
        bool, Parameter(negative="", help="For an agent's folder: check all manifests' signatures against the CA.")
    ] = False,
    keys: Annotated[Path, Parameter(help="With --verify: folder with the CA's certificate, ca.crt.")] = Path("keys"),
    as_json: Json = False,
) -> int:
    """Report whether merging helped; write a run's report, or list whose training is in an agent's model.

    A run's folder gets tables, pictures and a self-contained HTML page; an agent's folder gets lineage.csv.
    """
    from dimat.agent.daemon.folder import read_mark
    from dimat.results import read_results
    from dimat.ui.report.report import write_report
    from dimat.ui.terminal.run import ConsoleListener
    from dimat.ui.verdict import of_run

    mark = read_mark(run_dir)
    if mark is not None:
        return _report_agent(run_dir, str(mark["agent"]), keys if verify else None, as_json)
    if verify:
        raise ConfigError(f"{run_dir} is not an agent's folder; --verify needs one")
    with ConsoleListener() as console:
        files = write_report(run_dir, console)
    found = of_run(read_results(run_dir))
    show({"verdict": found.to_plain(), "files": [str(file) for file in files]} if as_json else found.line)
    say(f"wrote {len(files)} files; open {run_dir / 'report.html'}")
    return 0


@app.command
def evaluate(
    weights: Annotated[
        Path, Parameter(help="Weights file (safetensors), e.g. runs/digits-ring/final/agent-0.safetensors.")
    ],
    /,
    *,
    task: Annotated[
        str | None, Parameter(help="Bundled task (default: digits), `module:function` or `file.py:function`.")
    ] = None,
    file: Annotated[Path | None, Parameter(help="Experiment file to take the task from, instead of --task.")] = None,
    set_: Overrides = (),
    as_json: Json = False,
) -> int:
    """Evaluate a weights file on a task's test data."""
    from dimat.config import load_experiment, quoted
    from dimat.simulate.run import evaluate_file

    if file is not None and task is not None:
        raise ConfigError("give --task or --file, not both")
    chosen = [f"task.{'hook' if ':' in task else 'name'}={quoted(task)}"] if task is not None else []
    config = load_experiment(file, [*chosen, *set_])
    metrics = evaluate_file(weights, config)
    show(metrics if as_json else "\n".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    return 0


def _init_network(folder: Path, agents: int, task: str, force: bool) -> int:
    from dimat.cli.templates.network_template import write_network

    made = write_network(folder, agents, task=task, force=force)
    file, first = shlex.quote(str(made.file)), made.names[0]
    say(f"wrote {folder}: map.toml, agents.toml, and keys of {', '.join(made.names[:3])}{' …' * (agents > 3)}")
    if (kept := Path("agents") / made.run).exists():
        say(f"  {kept} holds an earlier run of this name, which agents would resume; remove it to start over")
    say("start each agent in its own terminal:")
    for name in made.names:
        say(f"  dimat agent {file} --name {name}")
    say("then look at one:")
    say(f"  dimat status {file} --name {first}")
    say(f"  dimat report {shlex.quote(str(Path('agents') / made.run / first))}")
    return 0


def _report_agent(folder: Path, agent: str, keys: Path | None, as_json: bool) -> int:
    from dimat.agent.lineage.verify import verify_ledger
    from dimat.ui.report.agent_summary import HEADER, agent_lineage, lineage_rows, report_json, report_lines
    from dimat.ui.report.report import write_csv
    from dimat.ui.verdict import of_agent

    last, made, own = agent_lineage(folder, agent)
    found = None if keys is None else verify_ledger(folder / "manifests.jsonl", keys, own)
    file = write_csv(folder / "lineage.csv", HEADER, lineage_rows(agent, last.round, made))
    if as_json:
        checked = None if found is None else {"lines": found.checked, "faults": found.faults, "torn": found.torn}
        show({**report_json(agent, last, made, of_agent(own)), "verified": checked})
    else:
        show("\n".join(report_lines(agent, last, made, of_agent(own))))
        say(f"wrote {file}")
    if found is None:
        return 0
    if found.torn:
        more = f" and {len(found.torn) - 1} more" if found.torn[1:] else ""
        say(f"dimat: manifests.jsonl, line {found.torn[0]}{more}: cut short or damaged, which proves nothing")
    for fault in found.faults:
        say(f"dimat: {fault}")
    if found.dropped:
        say(f"dimat: manifests.jsonl: {found.dropped} older lines were dropped to keep within agent.disk_quota_mb")
    say(f"{found.checked} signed manifests checked, {len(found.faults)} faults")
    return SecurityError.exit_code if found.faults else 0


def _simulate(
    config: ExperimentConfig, folder: Path, workers: int | None, overwrite: bool, quiet: bool, as_json: bool
) -> int:
    from dimat.simulate.folder import RunFolder
    from dimat.simulate.run import run_scenario
    from dimat.simulate.world.scenario import prepare
    from dimat.ui.jsonl import JsonlListener
    from dimat.ui.listeners import open_listeners
    from dimat.ui.report.report import write_report
    from dimat.ui.terminal.run import print_results

    if workers is not None:
        config = config.model_copy(update={"simulate": config.simulate.model_copy(update={"workers": workers})})
    scenario = prepare(config)
    with open_listeners(config, folder) as watching:
        opened = RunFolder(folder, config, overwrite=overwrite)
        with open_console(quiet) as console, closing(JsonlListener(opened.events)) as log:
            watching.warned += [console, log]
            results = run_scenario(scenario, opened, [console, log, *watching.listeners])
            watching.close()
            write_report(folder, console)
    if as_json:
        show(results.model_dump(mode="json"))
    else:
        print_results(results, sys.stdout)
        say(f"report: {folder / 'report.html'}")
    return 130 if results.status == "stopped" else 0


def _replay(run_dir: Path, as_json: bool) -> int:
    from dimat.simulate.replay import replay_run

    found = replay_run(run_dir)
    if as_json:
        show({"events": found.steps, "actions": found.actions, "difference": found.difference})
    else:
        same = found.difference or "all the same"
        show(f"{found.steps:,} events, {found.actions:,} actions: {same}")
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
    from dimat.ui.jsonl import JsonlListener
    from dimat.ui.report.report import write_comparison_report, write_report
    from dimat.ui.terminal.run import print_comparison

    with open_console(quiet) as console:
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
        show(outcome.comparison.to_plain())
    else:
        print_comparison(outcome.comparison, sys.stdout)
        say(f"report: {folder / 'report.html'}")
    return 0 if outcome.complete else 130
