"""The experiment file that `dimat init` writes: it runs as it is, and is short."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dimat.errors import ConfigError, unknown_name
from dimat.weights.durable import write_bytes

STARTER = """\
# A dimat experiment. Run it with `dimat simulate <this file>`.
# Keys left out keep their defaults; unknown keys are errors.

run = "{run}-ring"{pad}# names the run folder: runs/{run}-ring
seed = 0                       # root of every random draw; equal seeds give equal results

[topology]
graph = "ring"                 # see `dimat topology list`; or edges, file, python, map
agents = {agents}
mixing = "metropolis"

[task]
{task}
[train]
{train}
[merge]
{merge}
[schedule]
rounds = {rounds}
"""

_SKEWED = 'partition = { kind = "dirichlet", alpha = 0.5 }   # or "iid", "classes", "shards"\n'
_SMALL = """\
first_round_epochs = 5         # alone, before the first merge
epochs_per_round = 2
batch_size = 32
optimizer = { name = "adam", lr = 2e-3 }
initialisation = "shared"      # one start for all; "own" for networks that exist already
loss = "auto"                  # logit-adjusted where an agent's classes are skewed; "task": the task's own
"""
_DIMAT = """\
method = "dimat"               # or "average", "dimat-paper", "isolated", "centralised"
align_data = "local"           # inputs on which networks are compared: "local", "probe", "pooled"
"""
_PRETRAINED = """\
steps_per_round = 100
batch_size = 16                # samples per optimizer step,
accumulate = 2                 # put through the model in this many parts
optimizer = { name = "adamw", lr = 5e-5, weight_decay = 0.01 }
initialisation = "shared"
precision = "fp32"             # "bf16" on a GPU that has it
"""
_ADAPTERS = """\
steps_per_round = 100
batch_size = 8                 # samples per optimizer step,
accumulate = 2                 # put through the model in this many parts
optimizer = { name = "adamw", lr = 5e-4 }
optimizer_state = "fresh"      # merged factors have a basis of their own
precision = "fp32"             # "bf16" on a GPU that has it
"""

_TABLES: dict[str, dict[str, str]] = {
    "digits": {
        "run": "digits",
        "agents": "5",
        "rounds": "10",
        "deadline": "60",
        "task": 'name = "digits"                # bundled; or "images", or hook = "my_task.py:task"\n' + _SKEWED,
        "train": _SMALL,
        "merge": _DIMAT,
    },
    "images": {
        "run": "images",
        "agents": "5",
        "rounds": "10",
        "deadline": "600",
        "task": """\
name = "images"
"""
        + _SKEWED
        + """
[task.options]
train = "data/train"           # a Parquet file, a folder of them, or a folder of class folders of images
test = "data/test"
model = "resnet20"             # or "cnn"
""",
        "train": _SMALL,
        "merge": _DIMAT,
    },
    "hf-image-classification": {
        "run": "hf-images",
        "agents": "3",
        "rounds": "5",
        "deadline": "1800",
        "task": """\
name = "hf-image-classification"   # needs: pip install 'dimat[hf]'
"""
        + _SKEWED
        + """
[task.options.model]
name = "google/vit-base-patch16-224-in21k"    # on the Hugging Face hub, or a folder, which needs no network
# lora = { r = 8, targets = "all-linear" }    # freeze the model; agents train and exchange adapters

[task.options.data]
name = "uoft-cs/cifar10"       # on the hub, or a Parquet file, or a folder of class folders of images
train_samples = 2000           # leave out for all
test_samples = 500
""",
        "train": _PRETRAINED,
        "merge": _DIMAT,
    },
    "hf-causal-lm": {
        "run": "hf-text",
        "agents": "3",
        "rounds": "5",
        "deadline": "1800",
        "task": """\
name = "hf-causal-lm"          # needs: pip install 'dimat[hf]'

[task.options.model]
name = "distilbert/distilgpt2" # on the Hugging Face hub, or a folder, which needs no network
lora = { r = 8 }               # freeze the model; agents train and exchange adapters. Leave out to train all

[task.options.data]
name = "Salesforce/wikitext"   # on the hub, or a text, Parquet, JSON Lines or CSV file
subset = "wikitext-2-raw-v1"   # configuration of a data set on the hub
max_length = 128               # tokens in a block
train_samples = 2000           # documents; leave out for all
test_samples = 200
""",
        "train": _ADAPTERS,
        "merge": """\
method = "average"             # of what adapters stand for (combine = "lora-svd"), as the task asks for
""",
    },
}
"""The parts in which the starters of the bundled tasks differ. `deadline`: seconds, by estimate at least as long as a
round trains on two cores of a CPU (digits: 0.5 s), so that a machine half as fast as its peers is heard."""


def tables_of(task: str) -> Mapping[str, str]:
    """Return the parts of a starter that depend on the bundled task.

    These are the bodies of the tables "task", "train" and "merge", and "run", "agents", "rounds", "deadline". Raises
    ConfigError for an unknown task.
    """
    if task not in _TABLES:
        raise ConfigError(unknown_name("task", task, _TABLES, "--task"))
    return _TABLES[task]


def starter(task: str = "digits") -> str:
    """Return the starter experiment of a bundled task as text; ConfigError if unknown."""
    tables = tables_of(task)
    return STARTER.format(**tables, pad=" " * max(1, 18 - len(tables["run"])))


def write_starter(file: Path, *, task: str = "digits", force: bool = False) -> None:
    """Write the starter experiment of a bundled task.

    Raises ConfigError for an unknown task, and where the file exists and `force` is not set.
    """
    text = starter(task)
    if file.exists() and not force:
        raise ConfigError(f"{file} exists; choose another name, or --force to replace it")
    if not file.parent.is_dir():
        raise ConfigError(f"no folder {file.parent} to write {file.name} to")
    write_bytes(file, text.encode(), durable=False)
