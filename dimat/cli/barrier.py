"""`dimat barrier`: the loss on the way from one model to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

from dimat.cli.app import app
from dimat.cli.shared import AtLeastOne, Json, SeedRange, say, show


@app.command
def barrier(
    one: Annotated[Path, Parameter(help="Model: a safetensors file or a folder.")],
    other: Annotated[Path, Parameter(help="Model of the same architecture.")],
    /,
    *,
    model: Annotated[
        str,
        Parameter(
            help="Architecture: `module:function` or `file.py:function` that returns a task, or a model; or the name "
            "of a bundled task."
        ),
    ],
    data: Annotated[
        str | None,
        Parameter(
            help="Labelled examples, if --model returns no task: a safetensors file whose last tensor by name has the "
            "classes, or a function that returns batches (inputs, classes)."
        ),
    ] = None,
    align: Annotated[
        tuple[str, ...],
        Parameter(
            negative="", consume_multiple=False, help="Way of alignment; default: none, weights, auto. Repeatable."
        ),
    ] = (),
    points: Annotated[
        int, Parameter(validator=validators.Number(gte=3), help="Points on the line, with both ends.")
    ] = 11,
    repair: Annotated[str, Parameter(help="Repair at every point: batchnorm, variance, none.")] = "batchnorm",
    examples: Annotated[
        int, Parameter(validator=AtLeastOne, help="Most examples that the loss is measured on.")
    ] = 1000,
    device: Annotated[str, Parameter(help="Device: cpu, cuda, auto.")] = "cpu",
    seed: Annotated[int, Parameter(validator=SeedRange, help="Seed of the draws of examples.")] = 0,
    plot: Annotated[Path | None, Parameter(help="Write a picture of the lines to this PNG file.")] = None,
    as_json: Json = False,
) -> int:
    """Measure loss and metrics on the straight line between two models, for each way of alignment.

    The barrier is the largest rise of the loss above the straight line between the losses at the ends: 0 where a merge
    of the two costs nothing.
    """
    from dimat.ui.barrier.shown import barrier_lines, barrier_plain, check_picture, write_picture
    from dimat.ui.barrier.two_models import barrier_of_files

    check_picture(plot)
    lines, notes = barrier_of_files(
        one,
        other,
        model,
        data,
        align=align or ("none", "weights", "auto"),
        points=points,
        repair=repair,
        examples=examples,
        seed=seed,
        device=device,
    )
    show(barrier_plain(lines, notes) if as_json else "\n".join(barrier_lines(lines, notes)))
    if plot is not None:
        write_picture(plot, lines)
        say(f"wrote {plot}")
    return 0
