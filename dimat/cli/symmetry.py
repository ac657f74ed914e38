"""`dimat symmetry …`: shows and checks which tensor axes of a model are permuted together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dimat.cli.app import symmetry
from dimat.cli.shared import Json, SeedRange, say, show
from dimat.errors import PeerError, SymmetryError

_WHAT = (
    "`module:function` or `file.py:function` that returns a task, or a model and its example inputs; "
    "an experiment's TOML; or the name of a bundled task"
)
Model = Annotated[str, Parameter(help=f"{_WHAT}.")]
ModelOrSpec = Annotated[str, Parameter(help=f"{_WHAT}; or a JSON file written by `symmetry show --json`.")]
Outputs = Annotated[
    tuple[str, ...],
    Parameter(
        name="--output",
        negative="",
        consume_multiple=False,
        help="Name or flat index of an output that must not change; all by default. Repeatable.",
    ),
]


@symmetry.command(name="show")
def symmetry_show(
    hook: Model,
    /,
    *,
    verify: Annotated[bool, Parameter(help="Check the groups with random permutations in float64.")] = True,
    output: Outputs = (),
    html: Annotated[Path | None, Parameter(help="Write a page with a drawing of the groups to this file.")] = None,
    svg: Annotated[Path | None, Parameter(help="Write the drawing alone to this file.")] = None,
    as_json: Json = False,
) -> int:
    """Derive a model's symmetry groups; show their sizes, tensors, observation points and the frozen axes with reasons.

    Exit code 1 if the model cannot be traced, for example because its forward pass fails.
    """
    from dimat.ui.symmetry.commands import show_symmetry
    from dimat.ui.symmetry.tables import check_suffix

    check_suffix(html, ".html")
    check_suffix(svg, ".svg")
    text, traced = show_symmetry(hook, verify=verify, as_json=as_json, outputs=output, html=html, svg=svg)
    show(text)
    for file in (html, svg):
        if file is not None:
            say(f"wrote {file}")
    return 0 if traced else SymmetryError.exit_code


@symmetry.command(name="verify")
def symmetry_verify(
    hook: Model,
    /,
    *,
    seed: Annotated[int, Parameter(validator=SeedRange, help="Seed of the random permutations and weights.")] = 0,
    output: Outputs = (),
    as_json: Json = False,
) -> int:
    """Check numerically that permuting a model's groups does not change its outputs; name the groups that fail.

    Exit code 1 if a group fails, or if the model cannot be traced.
    """
    from dimat.ui.symmetry.commands import verify_model

    text, passed = verify_model(hook, seed=seed, as_json=as_json, outputs=output)
    show(text)
    return 0 if passed else SymmetryError.exit_code


@symmetry.command(name="diff")
def symmetry_diff(one: ModelOrSpec, other: ModelOrSpec, /, *, as_json: Json = False) -> int:
    """Compare two architectures: peers can align only if these are the same.

    Shows both summaries and the first difference. Exit code 3 if the architectures differ.
    """
    from dimat.ui.symmetry.diff import diff_symmetry

    text, same = diff_symmetry(one, other, as_json=as_json)
    show(text)
    return 0 if same else PeerError.exit_code
