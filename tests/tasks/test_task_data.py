"""Data in memory and their wrappers. References: plain indexing, torch's own DataLoader collation."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from dimat.errors import DataError
from dimat.tasks import Data, Subset, TensorData, from_dataset, input_batches
from dimat.tasks.data import balanced_draw, batch_bounds


def test_batches_are_rows() -> None:
    data = TensorData((torch.arange(10.0), torch.arange(10) * 2), torch.arange(10) % 3)
    inputs, targets = data.batch(torch.tensor([3, 1]))
    assert [t.tolist() for t in inputs] == [[3.0, 1.0], [6, 2]]
    assert targets.tolist() == [0, 1]
    assert isinstance(data, Data)
    with pytest.raises(DataError, match="differ in length"):
        TensorData(torch.zeros(3), torch.zeros(4))


def test_labels_are_there_only_for_classes() -> None:
    assert TensorData(torch.zeros(3), torch.arange(3)).labels is not None
    assert TensorData(torch.zeros(3), torch.zeros(3)).labels is None
    assert TensorData(torch.zeros(3), torch.zeros(3, 2, dtype=torch.int64)).labels is None
    assert Subset(TensorData(torch.zeros(3), torch.zeros(3)), torch.arange(2)).labels is None


def test_a_subset_of_a_subset() -> None:
    data = TensorData(torch.arange(10.0), torch.arange(10))
    part = Subset(Subset(data, torch.arange(9, -1, -1)), torch.tensor([0, 4]))
    assert len(part) == 2
    assert part.labels is not None
    assert part.labels.tolist() == [9, 5]
    assert part.batch(torch.tensor([1])).inputs[0].tolist() == [5.0]
    with pytest.raises(DataError, match="indices reach from 0 to 10 of 10"):
        Subset(data, torch.arange(11))


def test_augmentation_is_fresh_at_each_access_and_seeded() -> None:
    def shifted(inputs: tuple[Tensor, ...], generator: torch.Generator | None) -> tuple[Tensor, ...]:
        return inputs if generator is None else (inputs[0] + torch.rand(len(inputs[0]), generator=generator),)

    part = Subset(TensorData(torch.zeros(8), torch.zeros(8), shifted), torch.arange(4))
    generator = torch.Generator().manual_seed(0)
    first, second = (part.batch(torch.arange(4), generator).inputs[0] for _ in range(2))
    again = part.batch(torch.arange(4), torch.Generator().manual_seed(0)).inputs[0]
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    assert torch.equal(part.batch(torch.arange(4)).inputs[0], torch.zeros(4))


class RandomShift(Dataset[tuple[Tensor, int]]):
    targets = (0, 1, 0, 1)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((2,), float(index)) + torch.rand(2), self.targets[index]

    def __len__(self) -> int:
        return 4


def test_a_torch_dataset_with_random_transforms() -> None:
    data = from_dataset(RandomShift())
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 0, 1]
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    first, second = (data.batch(torch.tensor([2, 1]), generator) for _ in range(2))
    again = data.batch(torch.tensor([2, 1]), torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())
    assert first.inputs[0].shape == (2, 2)
    assert first.inputs[0].long().tolist() == [[2, 2], [1, 1]]
    assert first.targets.tolist() == [0, 1]
    assert not torch.equal(first.inputs[0], second.inputs[0])
    assert torch.equal(first.inputs[0], again.inputs[0])


def test_a_torch_dataset_of_several_inputs() -> None:
    data = from_dataset(TensorDataset(torch.zeros(5, 2), torch.ones(5), torch.arange(5)), labels=torch.arange(5))
    inputs, targets = data.batch(torch.tensor([4, 0]))
    assert [tuple(t.shape) for t in inputs] == [(2, 2), (2,)]
    assert targets.tolist() == [4, 0]
    with pytest.raises(DataError, match="must be"):
        from_dataset(TensorDataset(torch.zeros(5))).batch(torch.arange(2))
    with pytest.raises(DataError, match=r"labels have shape \(3,\)"):
        from_dataset(TensorDataset(torch.zeros(5)), labels=torch.arange(3))


@settings(deadline=None)
@given(samples=st.integers(1, 200), size=st.integers(1, 20))
def test_batch_bounds(samples: int, size: int) -> None:
    bounds = batch_bounds(samples, size)
    sizes = [b - a for a, b in pairwise(bounds)]
    assert bounds[0] == 0
    assert bounds[-1] == samples
    assert all(part == size for part in sizes[:-1])
    assert 1 <= sizes[-1] <= size + 1
    if size > 1 and samples > 1:
        assert min(sizes) > 1


def test_input_batches_follow_the_data_without_a_generator() -> None:
    data = TensorData(torch.arange(10.0), torch.arange(10))
    batches = input_batches(data, 4, samples=6)
    assert [inputs[0].tolist() for inputs in batches] == [[0, 1, 2, 3], [4, 5]]
    assert len(batches) == len(list(batches)) == 2


@settings(deadline=None)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), seed=st.integers(0, 99))
def test_balanced_draw_is_balanced_at_every_length(labels: list[int], seed: int) -> None:
    """Law: at each prefix no class is more than one ahead of a class that still has examples left."""
    given_labels = torch.tensor(labels)
    order = balanced_draw(given_labels, len(labels), np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(len(labels)))
    total = torch.bincount(given_labels, minlength=5)
    for length in range(len(labels) + 1):
        count = torch.bincount(given_labels[order[:length]], minlength=5)
        left = count < total
        if left.any():
            assert count.max() <= count[left].min() + 1
