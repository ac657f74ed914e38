"""The experiment file that `dimat init` writes: complete enough to run, short enough to read."""

from __future__ import annotations

from pathlib import Path

from dimat.durable import write_bytes
from dimat.errors import ConfigError

STARTER = """\
# A dimat experiment. Run it with `dimat simulate <this file>`.
# Keys left out keep their defaults; unknown keys are errors.

run = "digits-ring"            # names the run folder: runs/digits-ring
seed = 0                       # root of every random draw; equal seeds give equal results

[topology]
graph = "ring"                 # see `dimat topology list`; or edges, file, python, map
agents = 5
mixing = "metropolis"

[task]
name = "digits"                # bundled; or "images", or hook = "my_task.py:task"
partition = { kind = "dirichlet", alpha = 0.5 }   # or "iid", "classes", "shards"

[train]
first_round_epochs = 5         # alone, before the first merge
epochs_per_round = 2
batch_size = 32
optimizer = { name = "adam", lr = 2e-3 }

[merge]
method = "dimat"               # or "average", "dimat-paper", "isolated", "centralised"
align_data = "local"           # inputs on which networks are compared: "local", "probe", "pooled"

[schedule]
rounds = 10
"""


def write_starter(file: Path, *, force: bool = False) -> None:
    """Write the starter experiment; ConfigError if the file exists and `force` is not set."""
    if file.exists() and not force:
        raise ConfigError(f"{file} exists; choose another name, or --force to replace it")
    if not file.parent.is_dir():
        raise ConfigError(f"no folder {file.parent} to write {file.name} to")
    write_bytes(file, STARTER.encode(), durable=False)
