"""`dimat doctor`: checks everything that an agent needs and says how to mend each fault."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dimat.cli.agent import Name, load_agent
from dimat.cli.app import app
from dimat.cli.shared import Json, Overrides, show
from dimat.errors import DimatError


@app.command
def doctor(
    file: Annotated[Path, Parameter(help="Experiment file (TOML) with an [agent] table.")],
    /,
    *,
    name: Name = None,
    set_: Overrides = (),
    as_json: Json = False,
) -> int:
    """Check everything that an agent needs: configuration, keys, clock, port, peers, dial-back, DHT, GPU, disk, memory,
    versions. It changes nothing, and also works while the agent runs. Exit code: 0, or that of the first fault."""
    import sys

    from dimat.agent.doctor.check import Check, exit_code, failed
    from dimat.ui.terminal.doctor import check_lines, checks_json, summary

    checks: list[Check] = []

    def note(check: Check) -> None:
        checks.append(check)
        if not as_json:
            show("\n".join(check_lines(check)))
            sys.stdout.flush()  # some take seconds, and a person watches

    try:
        config = load_agent(file, name, set_)
    except DimatError as error:
        note(failed("config", error))
    else:
        from dimat.agent.doctor.doctor import examine  # loads torch

        for check in examine(config):
            note(check)
    show(checks_json(checks) if as_json else summary(checks))
    return exit_code(checks)
