"""Optimizers against torch's own, step by step."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import nn

from dimat.config import OptimizerConfig
from dimat.train.optimizers import build_optimizer

PLAIN: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.01, fused=True),
}


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_steps_and_state_are_those_of_torch(name: Literal["sgd", "adam", "adamw"]) -> None:
    """Reference: torch's class, bit for bit, also after its state went through a state dict."""
    config = OptimizerConfig(name=name, lr=0.1, momentum=0.9, weight_decay=0.01)
    trained: list[tuple[nn.Module, dict[str, Any]]] = []
    for make in (lambda model: build_optimizer(model, config), lambda model: PLAIN[name](model.parameters())):
        torch.manual_seed(0)
        model, inputs = nn.Linear(5, 3), torch.randn(8, 5)
        optimizer = make(model)
        for step in range(6):
            if step == 3:
                state = optimizer.state_dict()
                optimizer = make(model)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
        assert isinstance(optimizer, type(PLAIN[name](model.parameters())))
        trained.append((model, optimizer.state_dict()))
    (ours, state), (theirs, reference) = trained
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert state["param_groups"] == reference["param_groups"]
    for number, entries in reference["state"].items():
        assert entries.keys() == state["state"][number].keys()
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(state["state"][number][k])) for k, v in entries.items()
        )
