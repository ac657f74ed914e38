"""`dimat advise`: short probes choose the start, loss, merge, topology and local steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

from dimat.cli.app import app
from dimat.cli.shared import AtLeastOne, Json, Overrides, Overwrite, Quiet, Workers, say, show
from dimat.errors import ConfigError


@app.command
def advise(
    file: Annotated[Path, Parameter(help="Experiment file (TOML), of a simulation or of real agents.")],
    /,
    *,
    set_: Overrides = (),
    rounds: Annotated[int, Parameter(validator=AtLeastOne, help="Rounds per probe.")] = 4,
    budget: Annotated[
        float,
        Parameter(
            validator=validators.Number(gt=0, lte=1),
            help="Share of the experiment's epochs that a probe trains; at least 20 steps a round.",
        ),
    ] = 0.05,
    seeds: Annotated[int, Parameter(validator=AtLeastOne, help="Runs of each variant, to estimate the noise.")] = 2,
    out: Annotated[Path | None, Parameter(help="Folder in which to keep the probes and advice.json.")] = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Recommend settings from short simulated probes: prints a table, the lines to change and the cost.

    Varies one factor after the other: start, loss, optimizer state, combine, topology, mixing steps, local steps; also
    probes agents that train alone. Short probes favour settings that learn fast.
    """
    from dimat.config import load_experiment

    if not file.exists():
        raise ConfigError(f"no experiment file {file}; write one with: dimat init {file}")
    config = load_experiment(file, set_)
    from dimat.json_text import to_json
    from dimat.simulate.advise import advise as probe
    from dimat.ui.terminal.advice import advice_lines
    from dimat.weights.durable import write_bytes

    found = probe(
        config,
        rounds=rounds,
        budget=budget,
        seeds=seeds,
        out=out,
        workers=workers,
        overwrite=overwrite,
        tell=(lambda line: None) if quiet else (lambda line: say(f"probing {line}")),
    )
    if out is not None:
        write_bytes(out / "advice.json", (to_json(found.to_plain(), indent=1) + "\n").encode(), durable=False)
    show(found.to_plain() if as_json else "\n".join(advice_lines(found)))
    return 0
