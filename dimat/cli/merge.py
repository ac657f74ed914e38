"""`dimat merge`: models on disk."""

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
            help="A recipe (TOML); or models: safetensors files, folders. The first is the one that is merged into."
        ),
    ],
    method: Annotated[str | None, Parameter(help="Combine method; default: average.")] = None,
    base: Annotated[Path | None, Parameter(help="Model that deltas are taken from, or adapters merged into.")] = None,
    into_base: Annotated[
        bool, Parameter(negative="", help="Merge PEFT adapters into the base: a whole model comes out.")
    ] = False,
    out: Annotated[
        Path | None, Parameter(name=["--out", "-o"], help="Where to: a name in .safetensors, or a folder.")
    ] = None,
    set_: Annotated[
        tuple[str, ...],
        Parameter(name="--set", negative="", consume_multiple=False, help="Option of the method, e.g. density=0.5."),
    ] = (),
    weights: Annotated[str | None, Parameter(help="Mixing weights, e.g. 0.5,0.3,0.2; default: equal.")] = None,
    dtype: Annotated[
        str | None, Parameter(help="Type to write: fp32, bf16, fp16, fp64; default: the first model's.")
    ] = None,
    input_dtype: Annotated[str | None, Parameter(help="Type to read in; default: the type of each tensor.")] = None,
    model: Annotated[
        str | None,
        Parameter(help="Architecture, for merges that run the models: `module:function`, `file.py:function`."),
    ] = None,
    data: Annotated[
        str | None, Parameter(help="Inputs to run the models on: a safetensors file, or a function as in --model.")
    ] = None,
    align: Annotated[
        str | None,
        Parameter(help="Bring units into the first model's order: activations, weights, auto; default: none."),
    ] = None,
    align_vocabulary: Annotated[
        bool, Parameter(negative="", help="Bring rows of embeddings into one order, where tokens are in another order.")
    ] = False,
    repair: Annotated[str | None, Parameter(help="Re-estimate afterwards: batchnorm; default: none.")] = None,
    device: Annotated[str | None, Parameter(help="Where to merge: cpu (default), cuda, auto.")] = None,
    seed: Annotated[
        int | None, Parameter(validator=SeedRange, help="Seed of methods that draw at random; default: 0.")
    ] = None,
    shard_size: Annotated[str | None, Parameter(help="Bytes per file of a folder; default: 5GB.")] = None,
    from_mergekit: Annotated[Path | None, Parameter(help="Instead of INPUTS: a configuration of mergekit.")] = None,
    dry_run: Annotated[bool, Parameter(negative="", help="Check, print the plan, write nothing.")] = False,
    overwrite: Annotated[bool, Parameter(negative="", help="Replace a model that is there.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Merge models on disk by a recipe or from flags, tensor by tensor, without any network."""
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
