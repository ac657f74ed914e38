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
from dimat.ui.symmetry.draw import draw
from dimat.ui.symmetry.flow import flow_of
from dimat.ui.symmetry.tables import ModelSymmetry
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
    root = ET.fromstring(draw(ModelSymmetry(name, spec, tensors, None), flow_of(trace(network, (inputs,)))))
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


class Halves(nn.Module):
    """Two layers, between them a view to sizes that are taken from the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder_with_a_name_that_is_longer_than_any_box_is_wide = nn.Linear(6, 8)
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.encoder_with_a_name_that_is_longer_than_any_box_is_wide(x)
        return self.out(y.view(x.shape[0], x.shape[1], 2, 4))


def test_sizes_draw_no_edges() -> None:
    """A size that is taken from the input leads no edge to where it is used. Reference: the model is a chain."""
    flow = flow_of(trace(Halves(), (torch.randn(2, 5, 6),)))
    assert [box.kind for box in flow.boxes] == ["input", "module", "module", "output"]
    assert list(flow.edges) == [(0, 1), (1, 2), (2, 3)]


def test_long_names_keep_their_end_and_a_chain_needs_no_margin() -> None:
    """What tells names of one model apart stands at their end; the units of a group are never cut off; without an edge
    that goes round, the drawing is as wide as its boxes and fits a window of 360 px. Reference: the file's own text."""
    network, inputs = Halves(), torch.randn(2, 5, 6)
    spec = derive_symmetry(network, (inputs,))
    tensors = {n: (tuple(t.shape), str(t.dtype)) for n, t in network.state_dict().items()}
    root = ET.fromstring(draw(ModelSymmetry("halves", spec, tensors, None), flow_of(trace(network, (inputs,)))))
    texts = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert any(text.startswith("…") and text.endswith("longer_than_any_box_is_wide") for text in texts)
    assert spec.groups
    for group in spec.groups:
        assert any(group.id[-10:] in text and str(group.size) in text.rpartition(":")[2] for text in texts)
    assert float(root.get("width", 0)) <= 320
