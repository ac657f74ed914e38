"""Tracing: what cannot be traced or is not known, which outputs count, and that the model is left alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from dimat.errors import SymmetryError
from dimat.symmetry import (
    Observer,
    SymmetryWarning,
    derive_symmetry,
    freeze_failing,
    permute_weights,
    register_rule,
    trace,
    verify_symmetry,
)
from dimat.symmetry.derive import describe
from dimat.symmetry.rules import Call, Value
from dimat.symmetry.rules import call as rule_table
from tests.symmetry.zoo import MLP, SMALL, case, derived


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Refusing(nn.Module):
    """Will not be run by a tracer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if get_proxy_mode() is not None:
            raise RuntimeError("not by a tracer")
        return self.two(self.one(x))


def test_untraceable_model_gets_an_empty_spec_and_a_warning() -> None:
    """Reference: the third step of the ladder: freeze everything, average without alignment."""
    model = Refusing()
    with pytest.warns(SymmetryWarning, match=r"SYM-E01 cannot trace: .+; averaging without alignment") as record:
        spec = derive_symmetry(model, torch.randn(2, 4))
    assert len(record) == 1
    assert spec.trace_kind == "none"
    assert spec.groups == spec.axes == ()
    assert spec.warnings == (str(record[0].message),)
    assert {axis.tensor for axis in spec.frozen} == set(model.state_dict())
    assert verify_symmetry(model, spec, torch.randn(2, 4), generator()) == 0
    moved = permute_weights(model.state_dict(), spec, {})
    assert all(torch.equal(moved[key], value) for key, value in model.state_dict().items())


class Odd(nn.Module):
    """An operation without a rule between the first two of three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(3, 6), nn.Linear(6, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.renorm(torch.relu(self.one(x)), 2, 0, 1.0)
        return self.three(torch.relu(self.two(x)))


def test_unknown_operation_freezes_what_it_touches() -> None:
    """Reference: by hand, `renorm` meets the first layer's units and no others; 6 × 3 + 6 + 7 × 6 of 89."""
    model, inputs = Odd(), torch.randn(4, 3)
    with pytest.warns(
        SymmetryWarning, match=r"SYM-W02 no rule for aten.renorm.default at .*test_trace.py:\d+; froze 3"
    ) as w:
        spec = derive_symmetry(model, inputs)
    assert len(w) == 1
    assert [(group.id, group.size) for group in spec.groups] == [("three.weight/1", 7)]
    assert verify_symmetry(model, spec, inputs, generator()) < 1e-9
    (unknown,) = spec.unknown_ops
    total = sum(p.numel() for p in model.parameters())
    assert unknown.op == "aten.renorm.default"
    assert unknown.parameters_share == pytest.approx((18 + 6 + 42) / total)
    assert {(f.tensor, f.dim) for f in spec.frozen if "renorm" in f.reason} == {
        ("one.weight", 0),
        ("one.bias", 0),
        ("two.weight", 1),
    }


def test_registered_rule_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: renorm over axis 0 keeps the order of the others."""
    monkeypatch.setattr(rule_table, "_RULES", dict(rule_table._RULES))

    def renorm(call: Call) -> Value:
        return call.value("self")

    register_rule(torch.ops.aten.renorm, renorm)
    model, inputs = Odd(), torch.randn(4, 3)
    spec = derive_symmetry(model, inputs)
    assert [group.size for group in spec.groups] == [6, 7]
    assert verify_symmetry(model, spec, inputs, generator()) < 1e-9
    with pytest.raises(SymmetryError, match="is not an operation"):
        register_rule(torch.relu, renorm)


def test_rule_that_gives_a_wrong_shape_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the shape that the operation itself returned."""
    monkeypatch.setattr(rule_table, "_RULES", dict(rule_table._RULES))
    register_rule("aten.renorm", lambda call: Value(call.value("self").dims[:1]))
    with pytest.warns(SymmetryWarning, match="SYM-W02 no rule for aten.renorm"):
        spec = derive_symmetry(Odd(), torch.randn(4, 3))
    assert [group.size for group in spec.groups] == [7]


def tangent(x: Tensor) -> Tensor:
    """Forward-mode derivatives: torch's own functions in the graph, which are no operations."""
    return torch.func.jvp(torch.tanh, (x,), (x,))[1]


def branch(x: Tensor) -> Tensor:
    """An operation without a rule, in code that torch generates of it."""
    return torch.cond(x.sum() > 0, lambda x: torch.renorm(x, 2, 0, 1.0), torch.clone, (x,))


class Between(nn.Module):
    """One operation between the first two of three layers."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(3, 6), nn.Linear(6, 7), nn.Linear(7, 2)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.relu(self.two(self.operation(torch.relu(self.one(x))))))


@pytest.mark.parametrize(("operation", "first"), [(tangent, "_make_dual"), (branch, "aten.renorm.default")])
def test_a_warning_names_the_operation_and_its_place(operation: Callable[[Tensor], Tensor], first: str) -> None:
    """Reference: the name that torch gives a function, and the line of this file that calls it; no addresses in memory,
    and no line of code that torch generated."""
    with pytest.warns(SymmetryWarning) as told:
        spec = derive_symmetry(Between(operation), torch.randn(5, 3))
    assert [group.size for group in spec.groups] == [7]
    assert re.match(rf"SYM-W02 no rule for {first} at \S+test_trace\.py:\d+; froze [23] axes", str(told[0].message))
    said = [str(warning.message) for warning in told] + [axis.reason for axis in spec.frozen]
    assert not re.search(r"\b0x|<|unknown place", " ".join(said)), said
    assert {op.location.rpartition("/")[2].partition(":")[0] for op in spec.unknown_ops} == {"test_trace.py"}


def test_a_rule_that_stumbles_is_told_without_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: by hand, the exception's message without where the function lies in memory, as in all runs alike."""
    monkeypatch.setattr(rule_table, "_RULES", dict(rule_table._RULES))

    def stumbles(call: Call) -> Value:
        raise TypeError(f"{tangent} is not a number\nand more")

    register_rule("aten.renorm", stumbles)
    with pytest.warns(SymmetryWarning, match="SYM-W02 no rule for aten.renorm"):
        spec = derive_symmetry(Odd(), torch.randn(4, 3))
    (reason,) = {axis.reason for axis in spec.frozen if "renorm" in axis.reason}
    assert reason == "no rule for this call of aten.renorm.default (TypeError: <function tangent> is not a number)"


def picked(x: Tensor) -> Tensor:
    """Ninety operations on rows whose number depends on the data."""
    rows = torch.nonzero(x.sum(1) > 0)[:, 0]
    chosen = x[rows]
    for _ in range(30):
        chosen = nn.functional.layer_norm(torch.tanh(chosen) * 2, (6,))
    return torch.zeros_like(x).index_put((rows,), chosen)


def test_a_size_that_depends_on_data_is_one_cause() -> None:
    """Reference: by hand. A model without numbers (device meta) cannot tell how many rows there are, and everything
    after `nonzero` follows from that: one warning, which names it. With numbers the size is known, and nothing is."""
    with torch.device("meta"):
        model, inputs = Between(picked), torch.randn(5, 3)
    with pytest.warns(SymmetryWarning) as told:
        spec = derive_symmetry(model, inputs)
    assert [group.size for group in spec.groups] == [7]
    assert len(spec.unknown_ops) > 90
    (message,) = (str(warning.message) for warning in told)
    assert re.fullmatch(
        r"SYM-W02 a shape depends on data from aten\.nonzero\.default on, at \S+test_trace\.py:\d+; froze 3 axes "
        r"\(74\.2 % of parameters\); the graph could not be run on the example inputs to determine it",
        message,
    ), message
    assert [group.size for group in derive_symmetry(Between(picked), torch.randn(5, 3)).groups] == [6, 7]


def test_failing_groups_are_found_and_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: a wrong rule (a shift of units taken for nothing) spoils one group of three, by hand."""
    monkeypatch.setattr(rule_table, "_RULES", {**rule_table._RULES, "aten.roll": rule_table._RULES["aten.clone"]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # with units that are all dead, two trials may show nothing
        model, inputs = Shifted(), torch.randn(64, 3)
    spec = derive_symmetry(model, inputs)
    assert [group.size for group in spec.groups] == [9, 6, 7]
    with pytest.warns(SymmetryWarning, match=r"SYM-E03 group three.weight/1 failed invariance \(err=.+\); frozen"):
        mended = freeze_failing(model, spec, inputs, generator())
    assert [group.size for group in mended.groups] == [9, 6]
    assert mended.arch_hash != spec.arch_hash
    assert verify_symmetry(model, mended, inputs, generator()) < 1e-9
    assert freeze_failing(model, mended, inputs, generator()) is mended
    Observer(model, mended, inputs)


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(3, 6), nn.Linear(6, 7), nn.Linear(7, 9)
        self.four = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.two(torch.relu(self.one(x))))
        return self.four(torch.relu(self.three(x.roll(2, 1))))


@pytest.mark.parametrize("name", SMALL)
def test_without_any_one_rule_what_is_left_still_holds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: freezing is sound: delete each rule that the network needs, and outputs stay the same."""
    rules, used = rule_table._RULES, {"pointwise": ""}
    monkeypatch.setattr(rule_table, "_RULES", _Recording(rules, used))
    traced = trace(case(name).model, case(name).inputs)
    assert describe(traced, traced.select_outputs(None))[0] == derived(name)
    for gone in list(used):
        left = {key: rule for key, rule in rules.items() if key != gone}
        monkeypatch.setattr(rule_table, "_RULES", left)
        spec, _ = describe(traced, traced.select_outputs(None))
        assert verify_symmetry(case(name).model, spec, case(name).inputs, generator()) < 1e-9, gone


class _Recording(dict[str, Any]):
    def __init__(self, rules: dict[str, Any], used: dict[str, str]) -> None:
        super().__init__(rules)
        self._used = used

    def __getitem__(self, key: str) -> Any:
        self._used[key] = key
        return super().__getitem__(key)


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = torch.relu(self.one(x))
        return {"logits": self.two(hidden), "hidden": (hidden, x)}


def test_selected_outputs_alone_are_kept() -> None:
    """Reference: a returned hidden layer pins its units, unless it is not among the outputs asked for."""
    model, inputs = Several(), torch.randn(4, 3)
    with pytest.warns(SymmetryWarning, match=r"SYM-W05 output 'hidden.0' pins one.bias/0, .*; pass outputs="):
        assert derive_symmetry(model, inputs).groups == ()
    for outputs in (["logits"], [0]):
        spec = derive_symmetry(model, inputs, outputs=outputs)
        assert [group.size for group in spec.groups] == [6]
        assert verify_symmetry(model, spec, inputs, generator()) < 1e-9
    assert derive_symmetry(model, inputs, outputs=["logits", "hidden"]).groups == ()
    with pytest.raises(SymmetryError, match=r"unknown output 'logit'.*did you mean 'logits'"):
        derive_symmetry(model, inputs, outputs=["logit"])


class Frames(nn.Module):
    """Buffers and constants of all kinds, an unused layer, a no_grad block, keyword arguments."""

    scale: Tensor
    ramp: Tensor
    flat: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.unused = nn.Linear(3, 3)
        self.register_buffer("scale", torch.rand(6))
        self.register_buffer("ramp", torch.arange(6.0), persistent=False)
        self.register_buffer("flat", torch.full((6,), 0.5), persistent=False)

    def forward(self, x: Tensor, *, weight: Tensor) -> Tensor:
        x = torch.relu(self.one(x)) * self.scale + self.flat
        with torch.no_grad():
            shift = torch.relu(self.two.bias) + 1
        return self.three(torch.tanh(self.two(x) + shift) * self.ramp) * weight


def test_constants_and_buffers() -> None:
    """Reference: a saved buffer moves with its axis, a constant ramp pins one, an even constant does not."""
    model = Frames()
    inputs = {"x": torch.randn(3, 4), "weight": torch.ones(3, 1)}
    spec = derive_symmetry(model, inputs)
    assert [group.axes for group in spec.groups] == [
        (("one.bias", 0), ("one.weight", 0), ("scale", 0), ("two.weight", 1)),
    ]
    assert {(f.tensor, f.reason) for f in spec.frozen if f.tensor == "two.bias"} == {("two.bias", "constant")}
    assert verify_symmetry(model, spec, inputs, generator()) < 1e-9
    assert any(w == "SYM-W06 parameter unused.weight unused in trace; left unpermuted" for w in spec.warnings)


class Views(nn.Module):
    """Parameters that are parts of one block of memory, and parts that overlap."""

    def __init__(self, overlap: bool) -> None:
        super().__init__()
        memory = torch.randn(60)
        self.one = nn.Parameter(memory[:18].view(6, 3))
        self.two = nn.Parameter(memory[17 if overlap else 18 :][:12].view(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.one.T) @ self.two.T


def test_tensors_that_overlap_in_memory_are_frozen() -> None:
    """Reference: neighbours in one block are apart; one shared entry makes permuting either unsafe."""
    assert [group.size for group in derive_symmetry(Views(False), torch.randn(2, 3)).groups] == [6]
    spec = derive_symmetry(Views(True), torch.randn(2, 3))
    assert spec.groups == ()
    assert {f.reason for f in spec.frozen} == {"shares memory with another tensor in part"}


def test_modes_of_all_submodules_are_restored() -> None:
    """Reference: a model in training with one frozen BatchNorm keeps that state, also when tracing fails."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).train()
    model[1].eval()
    derive_symmetry(model, torch.randn(3, 4))
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    with pytest.raises(SymmetryError, match="RuntimeError"):
        trace(model, torch.randn(3, 5))
    assert [module.training for module in model.modules()] == [True, True, False, True, True]


def test_frozen_and_half_precision_parameters_are_traced_alike() -> None:
    """Reference: `requires_grad` and dtype do not change which units there are."""
    model = MLP().to(torch.bfloat16)
    for p in model.parameters():
        p.requires_grad_(False)
    with torch.no_grad():
        spec = derive_symmetry(model, torch.randn(3, 12, dtype=torch.bfloat16))
    assert [group.size for group in spec.groups] == [group.size for group in derived("mlp").groups]
