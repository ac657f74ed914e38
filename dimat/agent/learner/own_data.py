"""Describes an agent's training data for its checkpoints, and compares them on a restart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from blake3 import blake3

from dimat.config import ExperimentConfig
from dimat.errors import DataError
from dimat.tasks.base import Data
from dimat.train.base import Value

NEW_EPOCH = "a new epoch begins, over the current data"


def describe_data(data: Data, batches: int, part: str) -> dict[str, Value]:
    """Return a checkpoint's description of an agent's data: examples, batches in an epoch, a hash of the counts of its
    labels ("" if there are none), and the hash that decides which examples are the agent's (`part_of`)."""
    labels = data.labels
    counts = "" if labels is None else str([column.tolist() for column in torch.unique(labels, return_counts=True)])
    return {"rows": len(data), "batches": batches, "labels": hashed(counts) if counts else "", "part": part}


def part_of(config: ExperimentConfig, agent: str, agents: Sequence[str], accept: str) -> str:
    """Return a hash of the settings that decide which examples are an agent's: map, partition, seed, and its hold-out.

    `agents`: those among whom the data are split, none if each has its own data; `accept`: the merge's last
    stage, for which an agent may hold out examples.
    """
    split = [config.task.partition.model_dump_json(), str(config.seed), agent, *agents] if agents else []
    return hashed("\x1f".join([accept, *split]))


def compare_data(held: Mapping[str, Value], now: Mapping[str, Value], *, accepted: bool = False) -> str:
    """Compare an agent's data with those of its checkpoint; return why a new epoch begins, "" if the epoch continues.

    A checkpoint of an older version says nothing, and is taken to be of the same data.

    Raises DataError if the data have changed but no setting has, unless that is `accepted`.
    """
    changed = held.get("rows", now["rows"]) != now["rows"] or held.get("labels", now["labels"]) != now["labels"]
    if held.get("part", now["part"]) != now["part"]:
        return (
            f"the network map or the partition has changed since the checkpoint: the agent had {_told(held)}, "
            f"and has {_told(now)} now; {NEW_EPOCH}"
        )
    if changed and not accepted:
        raise DataError(
            f"the training data have changed since the checkpoint: {_told(held)} then, {_told(now)} now, with the same "
            "map and partition; restore the data, or set agent.accept_new_data = true to continue with the new data"
        )
    if changed:
        return f"the training data have changed since the checkpoint: {_told(held)} then, {_told(now)} now; {NEW_EPOCH}"
    if held.get("batches", now["batches"]) != now["batches"]:
        return f"train.batch_size has changed since the checkpoint; {NEW_EPOCH}"
    return ""


def hashed(text: str) -> str:
    """Return a short hash of a text, as a checkpoint keeps it."""
    return blake3(text.encode()).hexdigest(length=16)


def _told(data: Mapping[str, Value]) -> str:
    labels = str(data["labels"])
    return f"{data['rows']} examples" + (f" (counts of labels {labels[:8]}…)" if labels else "")
