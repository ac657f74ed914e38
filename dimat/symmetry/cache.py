"""Verified specs, kept on disk by architecture, so that an agent that starts again need not prove them anew.

A spec is found by the hash of its trace, the outputs asked for, and dimat's own source and torch's version, on which
the derivation rests. Nothing is kept of modules that export cannot follow (their trace is no sure sign of what they
are), nor once rules were registered from outside.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import nn

from dimat.errors import DimatError, SymmetryError
from dimat.symmetry.derive import derive_symmetry, fits
from dimat.symmetry.rules import own_rules
from dimat.symmetry.spec import SymmetrySpec
from dimat.symmetry.trace import SymmetryWarning, Trace, retrace
from dimat.symmetry.verify import freeze_failing
from dimat.weights.durable import write_bytes


def verified_symmetry(
    model: nn.Module,
    example_inputs: Any,
    generator: torch.Generator,
    *,
    outputs: Sequence[int | str] | None = None,
    folder: Path | None = None,
) -> SymmetrySpec:
    """Return a module's spec without the groups that fail the proof; its `warnings` say what was given up.

    `folder`: where specs are kept, `default_folder()` by default. The same spec comes out whether it was kept or not.
    Raises SymmetryError as `derive_symmetry` and `verify_symmetry` do.
    """
    path = _path(model, example_inputs, outputs, folder or default_folder())
    known = _read(path, model, example_inputs)
    if known is not None:
        return known
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SymmetryWarning)  # they are in the spec
        spec = freeze_failing(model, derive_symmetry(model, example_inputs, outputs), example_inputs, generator)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, spec.to_json().encode(), durable=False)
        except (OSError, DimatError):
            return spec  # a folder that cannot be written to, as in a read-only home: the next start takes longer
    return spec


def default_folder() -> Path:
    """Return `$XDG_CACHE_HOME/dimat/symmetry`, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dimat" / "symmetry"


def _path(model: nn.Module, example_inputs: Any, outputs: Sequence[int | str] | None, folder: Path) -> Path | None:
    try:
        traced = retrace(model, example_inputs)
    except SymmetryError:
        return None
    if traced.kind != "export" or not own_rules():
        return None
    return folder / f"{_key(traced, outputs)}.json"


def _key(traced: Trace, outputs: Sequence[int | str] | None) -> str:
    chosen = traced.select_outputs(outputs)
    return blake3(repr((traced.digest, chosen, outputs is None, torch.__version__, _sources())).encode()).hexdigest()


@cache
def _sources() -> str:
    """Return the hash of the code that derives and proves specs."""
    digest = blake3()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path | None, model: nn.Module, example_inputs: Any) -> SymmetrySpec | None:
    """Return a kept spec, or None where there is none, or it is damaged or another model's."""
    if path is None:
        return None
    try:
        spec = SymmetrySpec.from_json(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
        return None
    return spec if fits(spec, retrace(model, example_inputs)) else None
