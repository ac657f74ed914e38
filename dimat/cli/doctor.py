"""`dimat doctor`: would this agent run here, and how to mend what is wrong."""

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
    """Look at all that an agent needs: configuration, keys, clock, port, peers, the way back, DHT, GPU, disk, memory,
    versions. Works while it runs, too; changes nothing. Exit code 0, or that of the first fault."""
    import sys

    from dimat.agent.doctor.check import Check, exit_code, failed
    from dimat.ui.terminal.doctor import finding_lines, findings_json, summary

    findings: list[Check] = []

    def note(finding: Check) -> None:
        findings.append(finding)
        if not as_json:
            show("\n".join(finding_lines(finding)))
            sys.stdout.flush()  # some take seconds, and a person watches

    try:
        config = load_agent(file, name, set_)
    except DimatError as error:
        note(failed("config", error))
    else:
        from dimat.agent.doctor.doctor import examine  # loads torch

        for finding in examine(config):
            note(finding)
    show(findings_json(findings) if as_json else summary(findings))
    return exit_code(findings)
