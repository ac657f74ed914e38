"""What is measured of one model of the zoo, and the verdict on it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from dimat.errors import SymmetryError
from dimat.symmetry import SymmetrySpec, SymmetryWarning, derive_symmetry, trace, verify_symmetry
from dimat.symmetry.derive import describe, exchange_experts
from tests.symmetry.wide.entry import Entry, build

MOST_DERIVE_SECONDS = 1.0
_ORDINARY = ("model input", "position in a kernel", "spatial axis", "looked up by index")

T = TypeVar("T")


@dataclass
class Row:
    """Measurements of one model; seconds are of CPU time. `problems` is empty where all targets are met.

    `failure` says why there is no spec to measure. `frozen` lists, for the reasons that keep axes in place, the share
    of parameter elements in tensors that do not move at all, and of all parameters, largest first.
    """

    name: str
    source: str
    family: str
    unseen: bool
    failure: str = ""
    trace_kind: str = ""
    parameters: int = 0
    groups: int = 0
    heads: int = 0
    coverage: float = 0.0
    error: float = float("nan")
    export_seconds: float = 0.0
    derive_seconds: float = 0.0
    verify_seconds: float = 0.0
    unknown: dict[str, str] = field(default_factory=dict)
    frozen: list[tuple[str, float, float]] = field(default_factory=list)
    exception: str = ""
    problems: list[str] = field(default_factory=list)


@dataclass
class Subject:
    """One model of the zoo, built and described once for all that is asked of it. Its model must not be modified.

    `spec` is None where `row` says why there is none.
    """

    entry: Entry
    row: Row
    model: nn.Module = field(default_factory=nn.Identity)
    inputs: Any = ()
    spec: SymmetrySpec | None = None


def measure(entry: Entry) -> Subject:
    """Build, trace, describe and verify one model. What goes wrong on the way is told in the row."""
    row = Row(entry.name, entry.source, entry.family, entry.unseen, exception=entry.exception)
    subject = Subject(entry, row)
    try:
        subject.model, subject.inputs = model, inputs = build(entry)
        row.parameters = sum(parameter.numel() for parameter in model.parameters())
        subject.spec = spec = _derive(entry, model, inputs, row)
        _fill(row, spec, model)
        generator = torch.Generator().manual_seed(0)
        row.error, row.verify_seconds = _timed(lambda: verify_symmetry(model, spec, inputs, generator))
    except Exception as error:  # a table goes on to the next model, whatever a library raises
        row.failure = f"{type(error).__name__}: {_first_line(error)}"
    row.problems = shortcomings(entry, row)
    if row.derive_seconds >= MOST_DERIVE_SECONDS:
        row.problems.append(f"derived in {row.derive_seconds:.1f} s")
    return subject


def shortcomings(entry: Entry, row: Row) -> list[str]:
    """Return in what the row falls short of the model's targets, save that of time."""
    problems = [row.failure] if row.failure else []
    if not row.trace_kind:
        return problems
    if row.trace_kind == "none":
        problems.append("not traced")
    if not row.failure and not row.error <= entry.tolerance:
        problems.append(f"error {row.error:.1e}")
    if row.coverage < entry.coverage:
        problems.append(f"coverage {100 * row.coverage:.1f} % < {100 * entry.coverage:.0f} %")
    if entry.groups is not None and row.groups != entry.groups:
        problems.append(f"{row.groups} groups, not {entry.groups}")
    if entry.heads is not None and row.heads != entry.heads:
        problems.append(f"{row.heads} per head, not {entry.heads}")
    return problems


def _derive(entry: Entry, model: nn.Module, inputs: Any, row: Row) -> SymmetrySpec:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SymmetryWarning)  # what they say is in the spec
        try:
            traced, row.export_seconds = _timed(lambda: trace(model, inputs))
        except SymmetryError as error:
            row.frozen = [(f"cannot trace: {error}", 1.0, 1.0)]
            return derive_symmetry(model, inputs, entry.outputs)
        chosen = traced.select_outputs(entry.outputs)
        (spec, loud), row.derive_seconds = _timed(lambda: describe(traced, chosen, all_outputs=entry.outputs is None))
        return exchange_experts(model, traced, inputs, spec, loud)[0]


def _fill(row: Row, spec: SymmetrySpec, model: nn.Module) -> None:
    row.trace_kind, row.coverage = spec.trace_kind, spec.coverage
    row.groups = len(spec.groups)
    row.heads = sum(bool(group.parents) for group in spec.groups)
    for op in spec.unknown_ops:
        row.unknown.setdefault(op.op, op.location)
    if spec.trace_kind != "none":
        row.frozen = _reasons(spec, model)


def _reasons(spec: SymmetrySpec, model: nn.Module) -> list[tuple[str, float, float]]:
    moved = {axis.tensor for axis in spec.axes}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = max(sum(sizes.values()), 1)
    tensors: dict[str, set[str]] = {}
    for axis in spec.frozen:
        if axis.tensor in sizes and not axis.reason.startswith(_ORDINARY):
            tensors.setdefault(axis.reason, set()).add(axis.tensor)
    shares = [
        (reason, sum(sizes[n] for n in names - moved) / total, sum(sizes[n] for n in names) / total)
        for reason, names in tensors.items()
    ]
    return sorted(shares, key=lambda share: (-share[1], -share[2], share[0]))


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:200]
