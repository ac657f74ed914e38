"""Fingerprints: equal where the graph is bound to be the same, other ones where anything that makes it is changed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from dimat.symmetry.fingerprint import fingerprint
from tests.symmetry.zoo import MLP, ResNet20

SOURCE = """
import torch
from torch import nn
from fingerprint_helper import squash

SLOPE = 0.1


class Net(nn.Module):
    wide = False

    def __init__(self, width=8, act="relu"):
        super().__init__()
        self.one, self.two = nn.Linear(4, width), nn.Linear(width, 2)
        self.act = act

    def forward(self, x):
        return self.two(squash(getattr(torch, self.act)(self.one(x))))
"""
HELPER = "def squash(x):\n    return x.tanh()\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], ModuleType]:
    """Write a user's two files, and load them anew."""

    def load(source: str = SOURCE, helper: str = HELPER) -> ModuleType:
        for name, text in (("fingerprint_helper", helper), ("fingerprint_net", source)):
            path = tmp_path / f"{name}.py"
            path.write_text(text)
            found = importlib.util.spec_from_file_location(name, path)
            assert found is not None
            assert found.loader is not None
            module = importlib.util.module_from_spec(found)
            monkeypatch.setitem(sys.modules, name, module)
            found.loader.exec_module(module)
        return sys.modules["fingerprint_net"]

    return load


X = torch.zeros(3, 4)


def test_the_same_code_state_and_inputs_have_one_fingerprint(write: Callable[..., ModuleType]) -> None:
    """Reference: a module made twice, with other weights and inputs of other values, from files read twice."""
    first = fingerprint(write().Net(), X)
    assert first is not None
    assert fingerprint(write().Net(), X + 1) == first
    net = write().Net()
    with torch.no_grad():
        net.one.weight.zero_()
    assert fingerprint(net.eval(), (X,)) == first
    assert fingerprint(ResNet20(), torch.zeros(2, 3, 32, 32)) is not None


def test_whatever_makes_the_graph_changes_it(write: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: all differ from each other: a constructor's arguments, an attribute, the source of the class, that of
    a function it calls, a number in its module or class, shapes, dtypes and structure of the inputs, tied weights, a
    method that was replaced by another named one."""
    seen = [fingerprint(write().Net(), X)]
    seen.append(fingerprint(write().Net(9), X))
    seen.append(fingerprint(write().Net(act="sigmoid"), X))
    changed = write().Net()
    changed.act = "tanh"
    seen.append(fingerprint(changed, X))
    seen.append(fingerprint(write(SOURCE.replace("self.two(squash", "2 * self.two(squash")).Net(), X))
    seen.append(fingerprint(write(SOURCE, HELPER.replace("tanh", "sin")).Net(), X))
    module = write()
    module.SLOPE = 0.2
    seen.append(fingerprint(module.Net(), X))
    module = write()
    module.Net.wide = True
    seen.append(fingerprint(module.Net(), X))
    seen.append(fingerprint(write().Net(), torch.zeros(2, 4)))
    seen.append(fingerprint(write().Net(), X.double()))
    seen.append(fingerprint(write().Net().double(), X))
    seen.append(fingerprint(write().Net(), {"x": X}))
    module = write()
    tied, other = module.Net(4), module.Net(4)
    tied.two = nn.Linear(4, 4)
    other.two = nn.Linear(4, 4)
    tied.two.weight = tied.one.weight
    seen += [fingerprint(tied, X), fingerprint(other, X)]
    module = write(SOURCE + "\n\ndef later(self, x):\n    return self.two(self.one(x))\n")
    seen.append(fingerprint(module.Net(), X))
    monkeypatch.setattr(module.Net, "forward", module.later)
    seen.append(fingerprint(module.Net(), X))
    assert None not in seen
    assert len(set(seen)) == len(seen)


def test_code_that_cannot_be_named_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: None for a class inside a function, a lambda, a closure as method, a hook, a replaced `forward`, a
    module outside the tree, compiled code, a generator among the attributes."""

    class Local(nn.Linear):
        pass

    x = torch.zeros(3, 12)
    assert fingerprint(MLP(), x) is not None
    assert fingerprint(Local(12, 2), x) is None
    for value in (lambda x: x, [nn.Linear(2, 2)], (i for i in range(3)), torch.Generator()):
        model = MLP()
        model.extra = value  # type: ignore[assignment]
        assert fingerprint(model, x) is None
    model = MLP()
    model.layers[0].register_forward_hook(lambda *_: None)
    assert fingerprint(model, x) is None
    model = MLP()
    model.forward = model.layers[0].forward  # type: ignore[method-assign]
    assert fingerprint(model, x) is None
    with pytest.warns(DeprecationWarning, match="script"):
        compiled = torch.jit.script(nn.Linear(12, 2))
    assert fingerprint(compiled, x) is None
    factor = 2.0
    monkeypatch.setattr(MLP, "forward", lambda self, x: factor * x)
    assert fingerprint(MLP(), x) is None
