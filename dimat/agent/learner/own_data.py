"""Which data an agent trains on, as a checkpoint remembers them; compared where it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from blake3 import blake3

from dimat.config import ExperimentConfig
from dimat.errors import DataError
from dimat.tasks.base import Data
from dimat.train.base import Value

NEW_EPOCH = "a new epoch begins, over the data as they are now"


def describe_data(data: Data, batches: int, part: str) -> dict[str, Value]:
    """Return what a checkpoint remembers of an agent's data: examples, batches in an epoch, a hash of the counts of its
    labels ("" where there are none), and what decides which examples are the agent's (`part_of`)."""
    labels = data.labels
    counts = "" if labels is None else str([column.tolist() for column in torch.unique(labels, return_counts=True)])
    return {"rows": len(data), "batches": batches, "labels": hashed(counts) if counts else "", "part": part}


def part_of(config: ExperimentConfig, agent: str, agents: Sequence[str], accept: str) -> str:
    """Return a hash of what decides which examples of the task are an agent's: map, partition, seed, and its hold-out.

    `agents`: those that the data are split among, none where each has data of its own; `accept`: the merge's last
    stage, for which an agent may keep examples from training.
    """
    split = [config.task.partition.model_dump_json(), str(config.seed), agent, *agents] if agents else []
    return hashed("\x1f".join([accept, *split]))


def compare_data(held: Mapping[str, Value], now: Mapping[str, Value], *, accepted: bool = False) -> str:
    """Compare an agent's data with those of its checkpoint; return why a new epoch begins, "" where training goes on.

    A checkpoint of an older version tells nothing, and is taken to be of the same data.

    Raises DataError where the data have changed and nothing that was set has, unless that is `accepted`.
    """
    changed = held.get("rows", now["rows"]) != now["rows"] or held.get("labels", now["labels"]) != now["labels"]
    if held.get("part", now["part"]) != now["part"]:
        return (
            f"the network map or the partition has changed since the checkpoint: {_told(held)} were the agent's, "
            f"{_told(now)} are now; {NEW_EPOCH}"
        )
    if changed and not accepted:
        raise DataError(
            f"the training data have changed since the checkpoint: {_told(held)} then, {_told(now)} now, by the same "
            "map and partition; restore the data, or set agent.accept_new_data = true to go on with them"
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
