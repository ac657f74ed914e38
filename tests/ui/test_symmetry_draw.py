"""The drawing of symmetry groups: nothing lies on anything else, sticks out, or is wider than its place.

References: the geometry that the file itself states; letters of its monospaced font are six tenths of its size wide.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from dimat.symmetry import derive_symmetry
from dimat.symmetry.trace import trace
from dimat.tasks import resnet20
from dimat.ui.symmetry import Described
from dimat.ui.symmetry_draw import draw
from dimat.ui.symmetry_flow import flow_of
from tests.merge.align.models import made

SVG = "{http://www.w3.org/2000/svg}"
LETTER = 6.0


@dataclass(frozen=True)
class Piece:
    """A placed group of the drawing: a box, or an entry of the legend, of so much width and height."""

    x: float
    y: float
    wide: float
    tall: float

    def meets(self, other: Piece) -> bool:
        across = self.x < other.x + other.wide and other.x < self.x + self.wide
        return across and self.y < other.y + other.tall and other.y < self.y + self.tall


def model(name: str) -> tuple[nn.Module, torch.Tensor]:
    if name == "resnet20":
        return resnet20(1, "B", 10, 3), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return made(name)


def moved(element: ET.Element) -> tuple[float, float]:
    x, y = re.findall(r"-?[\d.]+", element.get("transform", "0 0"))
    return float(x), float(y)


@pytest.mark.parametrize("name", ["resnet20", "heads", "encoder", "lstm"])
def test_nothing_overlaps_or_sticks_out(name: str) -> None:
    """Reference: see above; the legend stands over the graph, and each text inside what it belongs to."""
    network, inputs = model(name)
    spec = derive_symmetry(network, (inputs,))
    tensors = {n: (tuple(t.shape), str(t.dtype)) for n, t in network.state_dict().items()}
    root = ET.fromstring(draw(Described(name, spec, tensors, None), flow_of(trace(network, (inputs,)))))
    *legend, graph = root.findall(f"{SVG}g")
    left, top = moved(graph)
    entries: list[Piece] = []
    for entry in legend:
        x, y = moved(entry)
        entries.append(Piece(x, y, 20 + LETTER * len(entry.findtext(f"{SVG}text") or ""), 11))
    assert len(entries) == len(spec.groups) + 1
    assert max(entry.y + entry.tall for entry in entries) <= top, "the legend ends above the graph"
    boxes: list[Piece] = []
    for box in graph.findall(f"{SVG}g"):
        x, y = moved(box)
        frame = box.find(f"{SVG}rect")
        assert frame is not None
        wide, tall = float(frame.get("width", 0)), float(frame.get("height", 0))
        boxes.append(Piece(left + x, top + y, wide, tall))
        cells = [float(rect.get("x", 0)) for rect in box.iterfind(f"{SVG}g/{SVG}rect")]
        title, *names = box.findall(f"{SVG}text")
        assert 6 + LETTER * len(title.text or "") <= wide
        assert all(6 + LETTER * len(text.text or "") <= min(cells, default=wide) for text in names)
        for rect in box.iterfind(f"{SVG}g/{SVG}rect"):
            assert float(rect.get("x", 0)) + float(rect.get("width", 0)) <= wide
    assert len(boxes) > 3
    whole = [float(number) for number in root.get("viewBox", "").split()]
    for pieces in (entries, boxes):
        for number, piece in enumerate(pieces):
            assert not any(piece.meets(other) for other in pieces[:number])
            assert piece.x + piece.wide <= whole[2]
            assert piece.y + piece.tall <= whole[3]
