"""`dimat symmetry …`: which axes of a model's tensors move together."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from dimat.cli.app import symmetry
from dimat.cli.shared import Json, show


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

    show(show_symmetry(hook, verify=verify, as_json=as_json))
    return 0
