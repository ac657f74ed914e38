"""Writes the drawing of `dimat symmetry show`: SVG alone, or HTML with tables around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from dimat.errors import SymmetryError
from dimat.symmetry import trace
from dimat.ui.report.page import document, facts, heading, notices, paragraph, section, table
from dimat.ui.symmetry.draw import draw
from dimat.ui.symmetry.flow import Flow, flow_of, loose
from dimat.ui.symmetry.tables import ModelSymmetry, frozen_table, groups_table, totals
from dimat.weights.durable import write_bytes


def write_drawing(
    described: ModelSymmetry, model: nn.Module, inputs: Any, *, html: Path | None, svg: Path | None, error: float | None
) -> None:
    """Draw the groups over the model's graph into files, each complete or not at all. Raises DataError."""
    picture = draw(described, _flow(described, model, inputs))
    if svg is not None:
        write_bytes(svg, picture.encode(), durable=False)
    if html is not None:
        write_bytes(html, page(described, picture, error).encode(), durable=False)


def page(described: ModelSymmetry, picture: str, error: float | None) -> str:
    """Return the page: figures, warnings, drawing, tables."""
    spec = described.spec
    numbers = [("groups", str(len(spec.groups))), ("of the movable entries move", f"{spec.coverage:.1%}")]
    numbers += [("parameters", f"{described.parameters:,}")] if described.parameters is not None else []
    numbers += [] if error is None else [("invariance error", f"{error:.1e}")]
    text = "Boxes are modules, from inputs down to outputs; a cell is an axis of their tensors: coloured with the "
    text += "number of its group, grey with its size where it never moves."
    frame = '<div class="scroll" style="background:#fff;border-radius:.5rem">'
    return document(
        f"Symmetry groups of {described.name}",
        (
            heading(f"Symmetry groups of {described.name}", totals(described)),
            facts(numbers),
            notices(spec.warnings),
            section("Drawing", paragraph(text), f"{frame}{picture}</div>"),
            section("Groups", table(groups_table(spec))),
            section("Frozen axes", table(frozen_table(described))),
        ),
    )


def _flow(described: ModelSymmetry, model: nn.Module, inputs: Any) -> Flow:
    if described.spec.trace_kind == "none":
        return loose(described.tensors)
    try:
        return flow_of(trace(model, inputs))
    except SymmetryError:
        return loose(described.tensors)
