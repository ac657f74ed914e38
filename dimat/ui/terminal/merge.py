"""Shows a merge: its plan in lines, and a progress bar while it runs."""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager

from dimat.merge_files.memory import shown
from dimat.merge_files.run import Job, Progress


def plan_lines(job: Job) -> str:
    """Return the plan of a merge, one line for each fact."""
    lines = [f"method   {_method(job.recipe.method, job.recipe.options)}"]
    for model, weight in zip(job.models, job.recipe.mixing):
        lines.append(f"model    {model.path}  weight {weight:g}, {len(model.files)} files")
    if job.base is not None:
        lines.append(f"base     {job.base.path}{'' if job.into is None else ', into which the adapters are merged'}")
    if job.recipe.rules:
        for part in job.parts:
            weights = ", ".join(f"{weight:g}" for weight in part.mixing)
            lines.append(
                f"part     {len(part.names):,} tensors: {_method(part.method.name, part.method.options)}, {weights}"
            )
    if job.network is not None:
        lines.append(f"network  {job.recipe.model}, run on {job.recipe.data}")
        if job.network.spec is not None:
            lines.append(f"align    {_method(job.recipe.align.name, job.recipe.align.options)}: {job.network.coverage}")
        lines.append(f"repair   {_method(job.recipe.repair.name, job.recipe.repair.options)}")
    lines.append(f"tensors  {len(job.infos):,}, {shown(job.bytes)}")
    lines.append(f"output   {job.out}: {len(job.layout)} files of weights")
    whole = "" if job.network is None else " and activations: models are held in full"
    lines.append(f"memory   about {shown(job.peak_memory())} besides mapped files{whole}")
    if job.adapters is not None:
        ranks = sorted({*job.adapters.ranks.values()})
        lines.append(f"ranks    {', '.join(map(str, ranks))}, of {len(job.adapters.ranks):,} modules")
    return "\n".join(lines)


@contextmanager
def progress_bar(quiet: bool = False) -> Generator[Progress | None]:
    """Show a bar on stderr while the block runs, on a terminal only; None elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    with Progress(
        "merging", BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _method(name: str, options: Mapping[str, object]) -> str:
    listed = ", ".join(f"{key}={value}" for key, value in options.items())
    return f"{name} ({listed})" if listed else name
