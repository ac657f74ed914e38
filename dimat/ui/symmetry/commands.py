"""`dimat symmetry show` and `verify`: derive a model's groups, check, print, draw them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

from dimat.json_text import to_json
from dimat.seeds import torch_generator
from dimat.symmetry import freeze_failing, tolerance_of, verify_symmetry
from dimat.ui.symmetry.page import write_drawing
from dimat.ui.symmetry.tables import describe, lines_of, load_model, summary_of


def show_symmetry(
    hook: str, *, verify: bool, as_json: bool, outputs: Sequence[str] = (), html: Path | None, svg: Path | None
) -> tuple[str, bool]:
    """Derive the groups of the model named by `hook`; return them as text or JSON, and whether it could be traced.

    `hook`: `module:function` or `file.py:function` returning a Task or (model, example inputs), an experiment's TOML,
    or a bundled task. `outputs`: names or flat indices of the outputs that must not change; all by default. `html` and
    `svg`: files for a drawing of the groups.
    """
    model, inputs = load_model(hook)
    described = describe(hook, model, inputs, outputs)
    spec = described.spec
    traced, error = spec.trace_kind != "none", None
    if verify and spec.groups:
        error = verify_symmetry(model, spec, inputs, torch_generator(0, "symmetry", "verify"))
    if html is not None or svg is not None:
        write_drawing(described, model, inputs, html=html, svg=svg, error=error)
    if as_json:
        summary = summary_of(described)
        return to_json({**json.loads(spec.to_json()), "invariance_error": error, "summary": summary}), traced
    more = [] if error is None else [f"invariance error {error:.1e} (float64)"]
    return "\n".join([*lines_of(described), *more]), traced


def verify_model(hook: str, *, seed: int, as_json: bool, outputs: Sequence[str] = ()) -> tuple[str, bool]:
    """Check a model's groups with random permutations; return the text to print, and whether all of them passed.

    If the error is too large, the groups that cause it are found by bisection. A model that cannot be traced fails.
    """
    model, inputs = load_model(hook)
    spec = describe(hook, model, inputs, outputs).spec
    if not spec.groups:
        passed = spec.trace_kind != "none"
        text = "\n".join([*spec.warnings, "no groups, nothing to verify"])
        found = {"passed": passed, "groups": 0, "error": None, "tolerance": None, "failed": [], "seed": seed}
        return (to_json(found) if as_json else text), passed
    error = verify_symmetry(model, spec, inputs, torch_generator(seed, "symmetry", "verify"))
    tolerance = tolerance_of(model, spec, inputs)
    passed, failed, kept = error <= tolerance, list[str](), spec
    if not passed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are in the spec
            kept = freeze_failing(model, spec, inputs, torch_generator(seed, "symmetry", "verify"))
        left = {group.id for group in kept.groups}
        failed = [group.id for group in spec.groups if group.id not in left]
    if as_json:
        counts = {"groups": len(spec.groups), "error": error, "tolerance": tolerance}
        return to_json({"passed": passed, **counts, "failed": failed, "seed": seed}), passed
    head = f"{len(spec.groups)} groups, error {error:.1e}, tolerance {tolerance:.0e}, seed {seed}: "
    lines = [head + ("passed" if passed else "FAILED")]
    lines += [warning for warning in kept.warnings if warning.startswith("SYM-E03")]
    lines += [f"failed: {name}" for name in failed]
    if not passed and not failed:
        lines.append("no group fails by itself under other permutations; try another --seed")
    return "\n".join(lines), passed
