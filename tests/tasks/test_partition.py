"""Partitions. References: the laws of a partition (disjoint, complete) on generated labels, and counting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dimat.config import PartitionConfig
from dimat.errors import PartitionError
from dimat.tasks import histogram, partition


def split(labels: Tensor | None, agents: int, seed: int = 0, samples: int | None = None, **config: Any) -> list[Tensor]:
    settings = PartitionConfig.model_validate(config)
    return partition(labels, agents, settings, np.random.default_rng(seed), samples=samples)


@settings(deadline=None, max_examples=150)
@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=80),
    agents=st.integers(1, 8),
    kind=st.sampled_from(["iid", "dirichlet", "classes", "shards"]),
    alpha=st.floats(0.05, 100),
    each=st.integers(1, 4),
    least=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_every_example_belongs_to_exactly_one_agent(
    labels: list[int], agents: int, kind: str, alpha: float, each: int, least: int, seed: int
) -> None:
    options: dict[str, Any] = {
        "kind": kind,
        "alpha": alpha,
        "classes_per_agent": each,
        "shards_per_agent": each,
        "min_samples": least,
    }
    try:
        parts = split(torch.tensor(labels), agents, seed, **options)
    except PartitionError:
        return  # what it says is tested below
    assert len(parts) == agents
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    assert min(map(len, parts)) >= least
    assert all(part.dtype == torch.int64 for part in parts)


LABELS = torch.arange(1000) % 10


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "classes", "shards"])
def test_seeded(kind: str) -> None:
    one, same, other = (split(LABELS, 5, seed, kind=kind) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("agents", [3, 7])
def test_iid_is_even_in_size_and_class_although_data_are_sorted(agents: int) -> None:
    labels = LABELS.sort().values
    counts = histogram(labels, split(labels, agents), 10)
    assert counts.sum(1).max() - counts.sum(1).min() <= 1
    assert (counts.max(0).values - counts.min(0).values).max() <= 1


def test_dirichlet_is_more_skewed_the_smaller_alpha() -> None:
    def skew(alpha: float) -> float:
        counts = histogram(LABELS, split(LABELS, 5, kind="dirichlet", alpha=alpha), 10).double()
        return float((counts / counts.sum(1, keepdim=True)).max(1).values.mean())

    assert skew(0.1) > skew(1.0) > skew(100.0)
    assert skew(1e4) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(("agents", "each"), [(5, 2), (10, 3), (4, 3), (10, 1)])
def test_classes_per_agent(agents: int, each: int) -> None:
    counts = histogram(LABELS, split(LABELS, agents, kind="classes", classes_per_agent=each), 10)
    assert ((counts > 0).sum(1) == each).all()
    holders = (counts > 0).sum(0)
    assert holders.min() >= 1
    assert holders.max() - holders.min() <= 1


def test_shards_bound_the_classes_of_an_agent() -> None:
    counts = histogram(LABELS, split(LABELS, 10, kind="shards", shards_per_agent=2), 10)
    assert (counts.sum(1) == 100).all()
    assert ((counts > 0).sum(1) <= 4).all()  # each shard of 50 lies in at most two classes of 100


def test_histogram_counts() -> None:
    counts = histogram(torch.tensor([0, 2, 2, 1]), [torch.tensor([0, 1]), torch.tensor([2, 3])], 4)
    assert counts.tolist() == [[1, 0, 1, 0], [0, 1, 1, 0]]


def test_without_labels_only_a_random_split_is_possible() -> None:
    parts = split(None, 4, samples=42)
    assert sorted(torch.cat(parts).tolist()) == list(range(42))
    with pytest.raises(PartitionError, match="needs class labels"):
        split(None, 4, samples=42, kind="dirichlet")


@pytest.mark.parametrize(
    ("samples", "agents", "config", "message"),
    [
        (4, 5, {}, "5 agents cannot share 4 training samples"),
        (20, 5, {}, "do not give 5 agents 8 each"),
        (100, 7, {"kind": "dirichlet", "alpha": 1e-3, "min_samples": 14}, "raise partition.alpha"),
        (100, 4, {"kind": "classes", "classes_per_agent": 2}, "raise partition.classes_per_agent to 3"),
        (100, 4, {"kind": "classes", "classes_per_agent": 11}, "there are 10 classes"),
        (40, 5, {"kind": "shards", "shards_per_agent": 9}, "lower partition.shards_per_agent"),
    ],
)
def test_errors_say_what_to_change(samples: int, agents: int, config: dict[str, Any], message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        split(torch.arange(samples) % 10, agents, **config)


@pytest.mark.parametrize("labels", [torch.tensor([0.0, 1.0, float("nan")]), torch.zeros(6, 3, dtype=torch.int64)])
@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_labels_that_are_no_classes_are_refused(labels: Tensor, kind: str) -> None:
    with pytest.raises(PartitionError, match=r"labels are .* one class, a whole number, for each example"):
        split(labels, 2, kind=kind)
