"""Copies of modules that `copy.deepcopy` refuses, and what the copies share."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

from dimat.symmetry import derive_symmetry, verify_symmetry
from dimat.symmetry.copy_module import copy_module


@dataclass
class Kept:
    loss: Tensor


class Keeps(nn.Module):
    """Keeps what it computed as an attribute, in a list, in an object; `keep` makes it of the hidden units."""

    def __init__(self, keep: Any) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 2)
        self.keep = keep
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x).relu()
        self.kept = self.keep(h.square().mean())
        return self.two(h)


def itself(loss: Tensor) -> Any:
    return loss


def listed(loss: Tensor) -> Any:
    return {"layers": [loss, (loss * 2,)]}


def models() -> list[nn.Module]:
    pruned = nn.Linear(8, 8)
    l1_unstructured(pruned, "weight", 0.25)
    normed = nn.utils.weight_norm(nn.Linear(8, 8))
    return [
        Keeps(itself),
        Keeps(listed),
        Keeps(Kept),
        *(nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 2)) for layer in (pruned, normed)),
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("number", range(5))
def test_what_a_forward_pass_left_behind_is_copied_as_values(number: int) -> None:
    """The copy computes the same, shares no weights, and has groups that hold."""
    torch.manual_seed(0)
    model, x = models()[number], torch.randn(4, 8)
    expected = model(x)
    copied = copy_module(model)
    assert torch.equal(copied(x), expected)
    assert {id(p) for p in copied.parameters()}.isdisjoint(id(p) for p in model.parameters())
    model(x)
    spec = derive_symmetry(model, (x,))
    assert spec.groups
    assert verify_symmetry(model, spec, (x,), torch.Generator().manual_seed(0)) < 1e-9


def test_what_cannot_be_copied_is_shared() -> None:
    """A lock, an iterator, and a hook that holds one."""
    model = nn.Linear(2, 2)
    lock, batches = threading.Lock(), (number for number in range(3))
    model.lock = lock  # type: ignore[assignment]
    model.batches = batches  # type: ignore[assignment]

    class Hook:
        held = None

        def __init__(self) -> None:
            self.held = threading.Lock()

        def __call__(self, *_: Any) -> None:
            return None

    model.register_forward_hook(Hook())
    copied = copy_module(model)
    assert copied.lock is lock
    assert copied.batches is batches
    assert copied.weight is not model.weight
    assert torch.equal(copied(torch.ones(1, 2)), model(torch.ones(1, 2)))
