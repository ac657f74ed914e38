"""Splits training data among agents: evenly, or as skewed as in real collaborations.

Every split is disjoint and complete: each example belongs to exactly one agent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dimat.config import PartitionConfig
from dimat.errors import PartitionError

TRIES = 1000
Indices = NDArray[np.int64]


def partition(
    labels: Tensor | None,
    agents: int,
    config: PartitionConfig,
    generator: np.random.Generator,
    *,
    samples: int | None = None,
) -> list[Tensor]:
    """Return the indices of each agent's examples, int64 and ascending.

    `labels`: (N,) classes, or None if there are none; then `samples` is N and only kind "iid" works, as a plain random
    split. Kinds: "iid" gives every agent the same number of each class, up to one; "dirichlet" draws the agents' shares
    of each class (Hsu et al. 2019, arXiv 1909.06335); "classes" gives each agent `classes_per_agent` classes, with
    every class at some agent; "shards" cuts the examples, sorted by class, and deals the pieces (McMahan et al. 2017).
    Raises PartitionError, saying what to change, if that is impossible with `min_samples` for each agent.
    """
    if labels is None:
        if config.kind != "iid":
            raise PartitionError(
                f'partition kind {config.kind!r} needs class labels, which this data does not have; use "iid"'
            )
        classes = np.zeros(samples or 0, dtype=np.int64)
    else:
        if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
            kind = f"{tuple(labels.shape)} {str(labels.dtype).removeprefix('torch.')}"
            raise PartitionError(f"labels are {kind}; a partition goes by one class, a whole number, for each example")
        classes = labels.cpu().numpy()
    if agents < 1:
        raise PartitionError(f"a partition among {agents} agents; there must be at least one")
    if agents > len(classes):
        raise PartitionError(
            f"{agents} agents cannot share {len(classes)} training samples; use fewer agents or more data"
        )
    if agents * config.min_samples > len(classes):
        raise PartitionError(
            f"{len(classes)} training samples do not give {agents} agents {config.min_samples} each; "
            "use fewer agents or a smaller partition.min_samples"
        )
    split = {"iid": _iid, "dirichlet": _dirichlet, "classes": _classes, "shards": _shards}[config.kind]
    pools = [generator.permutation(np.flatnonzero(classes == label)) for label in np.unique(classes)]
    for _ in range(TRIES):
        shares = split(pools, agents, config, generator)
        if min(map(len, shares)) >= config.min_samples:
            return [torch.from_numpy(np.sort(share)) for share in shares]
    remedy = {
        "dirichlet": "raise partition.alpha, or use a smaller partition.min_samples or fewer agents",
        "classes": "raise partition.classes_per_agent, or use a smaller partition.min_samples",
    }.get(config.kind, "use fewer agents or a smaller partition.min_samples")
    raise PartitionError(
        f"none of {TRIES} draws of kind {config.kind!r} gave all {agents} agents {config.min_samples} samples; {remedy}"
    )


def histogram(labels: Tensor, parts: Sequence[Tensor], classes: int) -> Tensor:
    """Return the number of examples of each class at each agent: (agents, classes) int64."""
    return torch.stack([torch.bincount(labels[part], minlength=classes) for part in parts])


def _iid(pools: list[Indices], agents: int, config: PartitionConfig, generator: np.random.Generator) -> list[Indices]:
    # Dealt like cards from a pile sorted by class: sizes and classes are even to within one.
    pile = np.concatenate(pools)
    return [pile[agent::agents] for agent in range(agents)]


def _dirichlet(
    pools: list[Indices], agents: int, config: PartitionConfig, generator: np.random.Generator
) -> list[Indices]:
    shares = generator.dirichlet(np.full(agents, config.alpha), size=len(pools))
    ends = np.cumsum(shares, axis=1)[:, :-1]
    pieces = [np.split(pool, np.rint(end * len(pool)).astype(np.int64)) for pool, end in zip(pools, ends, strict=True)]
    return [np.concatenate(own) for own in zip(*pieces, strict=True)]


def _classes(
    pools: list[Indices], agents: int, config: PartitionConfig, generator: np.random.Generator
) -> list[Indices]:
    each = config.classes_per_agent
    if each > len(pools):
        raise PartitionError(f"partition.classes_per_agent is {each}, but there are {len(pools)} classes")
    if each * agents < len(pools):
        raise PartitionError(
            f"{agents} agents with {each} classes each cannot hold all {len(pools)} classes; "
            f"raise partition.classes_per_agent to {-(-len(pools) // agents)} or use more agents"
        )
    holders: list[list[int]] = [[] for _ in pools]
    for agent in range(agents):
        # Always the classes with the fewest holders, ties at random: so numbers of holders differ by one at most.
        held = np.array([len(own) for own in holders])
        order = np.lexsort(np.stack([generator.random(len(pools)), held]))
        for label in order[:each]:
            holders[label].append(agent)
    shares: list[list[Indices]] = [[] for _ in range(agents)]
    for pool, own in zip(pools, holders, strict=True):
        for agent, piece in zip(own, np.array_split(pool, len(own)), strict=True):
            shares[agent].append(piece)
    return [np.concatenate(share) for share in shares]


def _shards(
    pools: list[Indices], agents: int, config: PartitionConfig, generator: np.random.Generator
) -> list[Indices]:
    pile = np.concatenate(pools)
    each = config.shards_per_agent
    if agents * each > len(pile):
        raise PartitionError(f"{agents} × {each} shards of {len(pile)} samples; lower partition.shards_per_agent")
    shards = np.array_split(pile, agents * each)
    dealt = generator.permutation(len(shards)).reshape(agents, each)
    return [np.concatenate([shards[i] for i in own]) for own in dealt]
