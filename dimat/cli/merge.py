"""`dimat merge`: merges models on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dimat.cli.app import app
from dimat.cli.shared import Json, Quiet, SeedRange, say, show
from dimat.version import __version__


@app.command
def merge(
    *inputs: Annotated[
        Path,
        Parameter(
            help="A recipe (TOML), or models (safetensors files or folders). The others are merged into the first."
        ),
    ],
    method: Annotated[str | None, Parameter(help="Combine method; default: average.")] = None,
    base: Annotated[Path | None, Parameter(help="Base model of deltas, or the model to merge adapters into.")] = None,
    into_base: Annotated[
        bool, Parameter(negative="", help="Merge PEFT adapters into the base and write a whole model.")
    ] = False,
    out: Annotated[
        Path | None, Parameter(name=["--out", "-o"], help="Output: a .safetensors file or a folder.")
    ] = None,
    set_: Annotated[
        tuple[str, ...],
        Parameter(name="--set", negative="", consume_multiple=False, help="Option of the method, e.g. density=0.5."),
    ] = (),
    weights: Annotated[str | None, Parameter(help="Mixing weights, e.g. 0.5,0.3,0.2; default: equal.")] = None,
    dtype: Annotated[
        str | None, Parameter(help="Type to write: fp32, bf16, fp16, fp64; default: the first model's.")
    ] = None,
    input_dtype: Annotated[
        str | None, Parameter(help="Type to read inputs in; default: each tensor's own type.")
    ] = None,
    model: Annotated[
        str | None,
        Parameter(help="Architecture, for merges that run the models: `module:function`, `file.py:function`."),
    ] = None,
    data: Annotated[
        str | None, Parameter(help="Inputs to run the models on: a safetensors file, or a function as in --model.")
    ] = None,
    align: Annotated[
        str | None,
        Parameter(help="Align units with the first model's: activations, weights, auto; default: none."),
    ] = None,
    align_vocabulary: Annotated[
        bool, Parameter(negative="", help="Reorder embedding rows where vocabularies list tokens in different orders.")
    ] = False,
    repair: Annotated[str | None, Parameter(help="Repair after merging: batchnorm, variance; default: none.")] = None,
    device: Annotated[str | None, Parameter(help="Device to merge on: cpu (default), cuda, auto.")] = None,
    seed: Annotated[
        int | None, Parameter(validator=SeedRange, help="Seed for methods that draw random numbers; default: 0.")
    ] = None,
    shard_size: Annotated[str | None, Parameter(help="Largest file in an output folder; default: 5GB.")] = None,
    from_mergekit: Annotated[Path | None, Parameter(help="Instead of INPUTS: a mergekit configuration.")] = None,
    dry_run: Annotated[bool, Parameter(negative="", help="Check and print the plan, but write nothing.")] = False,
    overwrite: Annotated[bool, Parameter(negative="", help="Replace an existing model.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Merge models on disk, as a recipe or flags say, tensor by tensor and without a network."""
    from dimat.merge_files import merge_files, prepare
    from dimat.merge_files.recipe import parse_weights, recipe_of
    from dimat.ui.terminal.merge import plan_lines, progress_bar

    flags = {"method": method, "base": base, "out": out, "dtype": dtype, "device": device, "seed": seed}
    flags |= {"model": model, "data": data, "align": align, "repair": repair, "input_dtype": input_dtype}
    changes = {key: str(value) if isinstance(value, Path) else value for key, value in flags.items()}
    changes |= {"shard_size": shard_size, "weights": parse_weights(weights), "into_base": into_base or None}
    changes |= {"align_vocabulary": align_vocabulary or None}
    job = prepare(recipe_of(inputs, changes, set_, from_mergekit), overwrite=overwrite)
    if dry_run:
        show(job.plan() if as_json else "\n".join([plan_lines(job), *(f"note: {note}" for note in job.notes)]))
        return 0
    with progress_bar(quiet) as progress:
        report = merge_files(job, version=__version__, overwrite=overwrite, progress=progress)
    if as_json:
        show(report.to_plain())
    elif not quiet:
        for path, share in report.moved.items():
            say(f"aligned {path}: {share:.0%} of its units moved")
        for note in report.notes:
            say(f"note: {note}")
        say(f"wrote {job.out}: {len(job.infos):,} tensors, {job.bytes:,} bytes")
    return 0
