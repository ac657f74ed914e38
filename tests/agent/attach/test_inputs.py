"""Inputs read from a user's data. References: by hand; torch's loaders."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from dimat.agent.attach.inputs import INPUTS_KEPT, ByName, read_inputs
from dimat.device import streams_kept
from dimat.errors import DataError


class Named(nn.Module):
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, scale: Tensor | None = None, labels: Any = None
    ) -> Tensor:
        assert labels is None
        out = input_ids.float() if attention_mask is None else input_ids * attention_mask
        return out.sum(-1) if scale is None else out.sum(-1) * scale


PLAIN = nn.Linear(3, 2)


def table(count: int, length: int, **more: Any) -> dict[str, Any]:
    ids = torch.arange(count * length).view(count, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(count), **more}


def test_batches_of_any_kind() -> None:
    """Reference: the tensors that went in, without targets."""
    x, y = torch.randn(6, 3), torch.zeros(6)
    for batch in ((x, y), [x, y], x, {"input": x, "label": y}, ({"input": x}, y)):
        assert torch.equal(read_inputs([batch, batch], PLAIN).tensors[0], torch.cat([x, x]))
    assert [t.shape for t in read_inputs([(x, x, y)], PLAIN).tensors] == [(6, 3), (6, 3)]
    assert [t.shape for t in read_inputs([((x, x), y)], PLAIN).tensors] == [(6, 3), (6, 3)]
    assert len(read_inputs([(torch.zeros(1000, 3), torch.zeros(1000))] * 5, PLAIN).tensors[0]) == INPUTS_KEPT


def test_tables_go_to_the_model_by_name() -> None:
    """Reference: the model called by name. An argument between two that are given is left to its default."""
    batch = {"scale": torch.full((4,), 2.0), **table(4, 5)}
    inputs = read_inputs([batch], Named())
    assert inputs.names == ("scale", "input_ids", "attention_mask")
    model = Named()
    expected = model(input_ids=batch["input_ids"], scale=batch["scale"])
    model.register_forward_pre_hook(ByName(inputs.names), prepend=True, with_kwargs=True)
    assert torch.equal(model(*inputs.tensors), expected)
    assert torch.equal(model(input_ids=batch["input_ids"], scale=batch["scale"]), expected)


def test_masked_batches_of_unequal_length_are_padded() -> None:
    """Reference: each batch by itself, as the model computes it."""
    short, long = table(2, 3), table(3, 7)
    inputs = read_inputs([short, long], Named())
    model = Named()
    expected = torch.cat([model(b["input_ids"], b["attention_mask"]) for b in (short, long)])
    assert torch.equal(model(*inputs.tensors), expected)


class Marked(Dataset[Tensor]):
    """Draws from generators of its own."""

    def __init__(self) -> None:
        self.arrays = np.random.default_rng(0)
        self.plain = random.Random(0)

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index), self.arrays.random(), self.plain.random()])


@pytest.mark.parametrize("workers", [{}, {"num_workers": 2, "persistent_workers": True}], ids=["own", "workers"])
def test_a_loader_is_left_as_it_was(workers: dict[str, Any]) -> None:
    """Reference: a loader that nobody has read from gives the same batches afterwards."""

    def loader() -> DataLoader[Tensor]:
        return DataLoader(Marked(), 8, shuffle=True, generator=torch.Generator().manual_seed(3), **workers)

    used, fresh = loader(), loader()
    torch.manual_seed(5)
    with streams_kept():
        read_inputs(used, PLAIN)
    first = torch.rand(3)
    one = list(used)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), first)
    assert all(torch.equal(a, b) for a, b in zip(one, list(fresh), strict=True))


class Stream(IterableDataset[Tensor]):
    """Examples that are read once, or afresh each time."""

    def __init__(self, *, once: bool) -> None:
        self._once = (torch.full((3,), float(i)) for i in range(3000)) if once else None

    def __iter__(self) -> Iterator[Tensor]:
        return self._once or iter([torch.full((3,), float(i)) for i in range(3000)])


def test_examples_that_are_read_once_are_told() -> None:
    """A loop over the loader does not see them any more."""
    with pytest.warns(UserWarning, match="read only once, so the first 1,024, on which networks are compared, are not"):
        read_inputs(loader := DataLoader(Stream(once=True), 8), PLAIN)
    assert next(iter(loader))[0, 0] == 1024
    read_inputs(loader := DataLoader(Stream(once=False), 8), PLAIN)
    assert next(iter(loader))[0, 0] == 0


def test_global_streams_are_left_as_they_were() -> None:
    """Reference: the draws that come without what is inside."""

    def draws() -> tuple[float, float, float]:
        return torch.rand(()).item(), float(np.random.rand()), random.random()

    def seed() -> None:
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)

    seed()
    expected = draws()
    seed()
    with streams_kept():
        draws()
        list(DataLoader(TensorDataset(torch.arange(9.0)), shuffle=True))
    assert draws() == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([(torch.zeros(4, 3), 0), (torch.zeros(4, 5), 0)], r"input 0 of batch 1 has examples of shape \(5,\)"),
        ([(torch.zeros(4, 3), 0), (torch.zeros(4, 3).long(), 0)], r"batch 1 has .*int64"),
        ([torch.zeros(4, 3), (torch.zeros(4, 3), torch.zeros(4, 3), 0)], "batch 1 has other inputs"),
        ([("text", 0)], "not str"),
        ([{"other": torch.zeros(4, 3)}], "forward needs 'input'"),
        ([(torch.zeros(4, 3), torch.zeros(3, 3), 0)], "each needs the batch's examples along its first axis"),
        ([(torch.zeros(()), 0)], "each needs the batch's examples"),
        ([object()], "not object"),
        ([], "fewer than two"),
        (TensorDataset(torch.randn(8, 6)), "a TensorDataset gives single examples; give batches, by a DataLoader"),
        (5, "what is of type int gives none"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_line(data: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as fault:
        read_inputs(data, PLAIN)
    assert "\n" not in str(fault.value)
