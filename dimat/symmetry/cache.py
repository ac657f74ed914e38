"""Verified specs kept on disk by architecture, so that a restart does not derive them again.

The key of a spec is the module's fingerprint, of its code and constructor state, which needs no tracing; a spec found
this way is checked numerically before it is used. A module without a fingerprint has the hash of its trace as key. In
both cases the key also holds the requested outputs, dimat's own rules and torch's version. No spec is kept of modules
that export cannot follow (their paths depend on the inputs' values), nor after rules were registered by users.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import nn

from dimat.errors import DimatError, SymmetryError
from dimat.symmetry.derive import derive_symmetry, fits
from dimat.symmetry.fingerprint import fingerprint
from dimat.symmetry.rules import own_rules
from dimat.symmetry.spec import SymmetrySpec
from dimat.symmetry.trace import SymmetryWarning, Trace, retrace
from dimat.symmetry.verify import freeze_failing, holds
from dimat.weights.durable import write_bytes


def verified_symmetry(
    model: nn.Module,
    example_inputs: Any,
    generator: torch.Generator,
    *,
    outputs: Sequence[int | str] | None = None,
    folder: Path | None = None,
) -> SymmetrySpec:
    """Return a module's spec without the groups that fail verification; its `warnings` name these.

    `folder`: where specs are kept, `default_folder()` by default; without a folder none is kept. The returned spec is
    the same whether it was kept or not. A kept one that does not hold for this module is derived again, with a
    SymmetryWarning (SYM-W07).
    Raises SymmetryError as `derive_symmetry` and `verify_symmetry` do.
    """
    folder = folder or default_folder()
    mark = fingerprint(model, example_inputs) if own_rules() and folder is not None else None
    start = generator.get_state()
    path = None
    if mark is not None and folder is not None:
        path = folder / f"{_key(mark, outputs)}.json"
        known = _read(path)
        if known is not None:
            if holds(model, known, example_inputs, generator):
                return known
            generator.set_state(start)
            message = f"SYM-W07 the symmetry groups in {path} do not hold for this model; derived again"
            warnings.warn(message, SymmetryWarning, stacklevel=2)
    elif folder is not None:
        traced = _exported(model, example_inputs)
        path = None if traced is None else folder / f"{_key(traced.digest, outputs)}.json"
        known = None if path is None else _read(path)
        if known is not None and traced is not None and fits(known, traced):
            return known
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SymmetryWarning)  # they are in the spec
        spec = freeze_failing(model, derive_symmetry(model, example_inputs, outputs), example_inputs, generator)
    if path is not None and spec.trace_kind == "export":
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, spec.to_json().encode(), durable=False)
        except (OSError, DimatError):
            return spec  # a folder that cannot be written to, as in a read-only home: the next start takes longer
    return spec


def forget(spec: SymmetrySpec, folder: Path | None = None) -> None:
    """Remove the kept file of a spec that turned out to be another model's; the next start derives it again."""
    folder = folder or default_folder()
    for path in folder.glob("*.json") if folder is not None else ():
        kept = _read(path)
        if kept is not None and kept.arch_hash == spec.arch_hash:
            with suppress(OSError):  # in a folder that cannot be written to: it is checked, and derived anew, each time
                path.unlink()


def default_folder() -> Path | None:
    """Return `$XDG_CACHE_HOME/dimat/symmetry`, by default under ~/.cache; None if there is no home directory either:
    then nothing is kept."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(named) and not os.environ.get("HOME", "unset"):
        return None  # empty, it would stand for the root of the file system
    try:
        cache = Path(named) if os.path.isabs(named) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return cache / "dimat" / "symmetry" if cache.is_absolute() else None


def _exported(model: nn.Module, example_inputs: Any) -> Trace | None:
    """Return the trace that serves as the key of a module without a fingerprint, if it has one."""
    if not own_rules():
        return None
    try:
        traced = retrace(model, example_inputs)
    except SymmetryError:
        return None
    return traced if traced.kind == "export" else None


def _key(mark: str, outputs: Sequence[int | str] | None) -> str:
    chosen = None if outputs is None else tuple(outputs)
    return blake3(repr((mark, chosen, torch.__version__, _sources())).encode()).hexdigest()


@cache
def _sources() -> str:
    """Return the hash of the code that derives and verifies specs."""
    digest = blake3()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> SymmetrySpec | None:
    """Return a kept spec, or None if there is none or it is damaged."""
    try:
        return SymmetrySpec.from_json(path.read_text())
    except (OSError, ValueError):
        return None
