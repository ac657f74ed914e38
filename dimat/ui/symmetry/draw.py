"""Draws symmetry groups over a model's graph, as one self-contained SVG.

Boxes are in layers by their longest path from an input. A box lists its tensors, those with the same axes in one row;
an axis is a cell, divided into its segments, in the colours and numbers of the groups that move it.
"""

from __future__ import annotations

from math import prod

from dimat.symmetry import Layout
from dimat.ui.report.page import esc
from dimat.ui.symmetry.flow import Box, Flow
from dimat.ui.symmetry.tables import ModelSymmetry, units_text

_WIDE, _ROW, _GAP, _LAYER, _CELL = 300, 15, 24, 22, 58  # a box fits into a window of 360 px
_LETTER, _LEGEND = 6, 66
_FROZEN = "#d4d7db"


def colour(number: int) -> str:
    """Return the colour of group `number`: hues a golden angle apart, light enough for black text."""
    return f"hsl({number * 137.508 % 360:.0f} {(70, 55, 85)[number % 3]}% {(76, 64, 84)[number // 2 % 3]}%)"


def draw(described: ModelSymmetry, flow: Flow) -> str:
    """Return the SVG: the legend in columns, so that a narrow window also shows the graph, and the graph below it."""
    painter = _Painter(described)
    places, width, height = _places(flow, painter)
    legend, top = painter.legend(width)
    wide, tall = width + 20, top + height + 20
    body = [
        *(_edge(places, start, end, dashed=False) for start, end in flow.edges),
        *(_edge(places, start, end, dashed=True) for start, end in flow.back),
        *(painter.box(box, *place) for box, place in zip(flow.boxes, places, strict=True)),
    ]
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {tall}" '
            f'width="{wide}" height="{tall}" font-family="monospace" font-size="10" role="img">',
            f"<title>Symmetry groups of {esc(described.name)}</title>",
            '<rect width="100%" height="100%" fill="#ffffff"/>',
            *legend,
            f'<g transform="translate(10 {top})">',
            *body,
            "</g>",
            "</svg>",
        )
    )


class _Painter:
    def __init__(self, described: ModelSymmetry) -> None:
        self._described = described
        spec = described.spec
        self._number = {group.id: number for number, group in enumerate((*spec.groups, *spec.numbered), 1)}
        self._layouts = {(axis.tensor, axis.dim): axis.layout for axis in spec.axes}
        for stack in spec.stacks:
            for axis in spec.axes:
                if axis.tensor == stack.tensor and axis.dim:
                    self._layouts.update({(name, axis.dim - 1): axis.layout for name in stack.sources})

    def legend(self, width: int) -> tuple[list[str], int]:
        """Return the legend's entries, in as many columns as fit the width, and the height below them."""
        groups = (*self._described.spec.groups, *self._described.spec.numbered)
        sizes = self._described.spec.sizes
        parts = [(f"{self._number[g.id]}  ", g.id, f": {units_text(g, sizes)}") for g in groups]
        parts.append(("", "never moves (number: size)", ""))
        most = min(_LEGEND, (width - 20) // _LETTER)
        shown = [f"{before}{_short(name, most - len(before + after))}{after}" for before, name, after in parts]
        lines = ["".join(part) for part in parts]
        fills = [*(colour(self._number[g.id]) for g in groups), _FROZEN]
        column = 40 + _LETTER * max(map(len, shown))
        rows = -(-len(lines) // max(1, width // column))
        drawn = [
            f'<g transform="translate({10 + at // rows * column} {10 + at % rows * _ROW})">'
            f'<rect width="14" height="11" fill="{fill}"/>'
            f'<text x="20" y="9">{esc(text)}<title>{esc(line)}</title></text></g>'
            for at, (text, line, fill) in enumerate(zip(shown, lines, fills, strict=True))
        ]
        return drawn, 10 + rows * _ROW + 20

    def rows(self, box: Box) -> list[tuple[str, list[Layout | int]]]:
        """Return (names, axes) of the tensors of a box, grouped by equal axes; frozen axes as their size."""
        found: dict[tuple[Layout | int, ...], list[str]] = {}
        for name in box.tensors:
            shape = self._described.tensors.get(name, ((), ""))[0]
            axes = tuple(self._layouts.get((name, dim), size) for dim, size in enumerate(shape))
            if axes:
                found.setdefault(axes, []).append(name.rpartition(".")[2])
        return [(" ".join(names), list(axes)) for axes, names in found.items()]

    def height(self, box: Box) -> int:
        return _ROW * (1 + len(self.rows(box))) + 6

    def box(self, box: Box, x: float, y: float, height: int) -> str:
        round_ = 3 if box.kind == "module" else 9
        fill = {"module": "#f7f8fa", "join": "#ffffff"}.get(box.kind, "#e9edf2")
        pieces = [
            f'<g transform="translate({x:.0f} {y:.0f})"><rect width="{_WIDE}" height="{height}" rx="{round_}" '
            f'fill="{fill}" stroke="#8a94a0"/><text x="6" y="12" font-weight="bold">'
            f"{esc(_short(box.title, (_WIDE - 12) // _LETTER))}"
            f"<title>{esc(box.title)}</title></text>"
        ]
        for row, (names, axes) in enumerate(self.rows(box), 1):
            top = row * _ROW + 2
            pieces.append(f'<text x="6" y="{top + 10}">{esc(_several(names, 16))}<title>{esc(names)}</title></text>')
            wide = min(_CELL, (_WIDE - 112) // max(len(axes), 1))
            pieces += [self._cell(axis, 108 + at * wide, top, wide - 3) for at, axis in enumerate(axes)]
        return "".join([*pieces, "</g>"])

    def _cell(self, axis: Layout | int, x: float, y: int, wide: int) -> str:
        if isinstance(axis, int):
            return _rect(x, y, wide, _FROZEN, str(axis), f"{axis}: never moves")
        total = max(sum(prod(f.size for f in segment) for segment in axis), 1)
        pieces: list[str] = []
        for segment in axis:
            share = wide * prod(f.size for f in segment) / total
            each = share / len(segment)
            for factor in segment:
                if factor.parts is not None:
                    pieces.append(self._cell(factor.parts, x, y, max(int(each), 1)))
                elif factor.group is None:
                    pieces.append(_rect(x, y, each, _FROZEN, str(factor.size), f"{factor.size}: never moves"))
                else:
                    number = self._number[factor.group]
                    tooltip = f"{factor.size} units of group {number}, {factor.group}"
                    pieces.append(_rect(x, y, each, colour(number), str(number), tooltip))
                x += each
        return "".join(pieces)


def _rect(x: float, y: float, wide: float, fill: str, text: str, tooltip: str) -> str:
    inside = f'<text x="{x + 2:.1f}" y="{y + 10}" font-size="9">{text}</text>' if wide >= 6 * len(text) + 2 else ""
    shape = f'<rect x="{x:.1f}" y="{y}" width="{max(wide, 0.5):.1f}" height="{_ROW - 2}" fill="{fill}"/>'
    return f"<g>{shape}{inside}<title>{esc(tooltip)}</title></g>"


def _places(flow: Flow, painter: _Painter) -> tuple[list[tuple[float, float, int]], int, int]:
    """Return (x, y, height) of each box, and the size of the drawing. A box is roughly below those that feed it."""
    if not flow.edges:  # no graph: a column each of 40 boxes
        layer = [number % 40 for number in range(len(flow.boxes))]
    else:
        layer = flow.layers()
    rows: dict[int, list[int]] = {}
    for number, row in enumerate(layer):
        rows.setdefault(row, []).append(number)
    before: dict[int, list[int]] = {}
    for start, end in flow.edges:
        before.setdefault(end, []).append(start)
    column: dict[int, int] = {}
    places: list[tuple[float, float, int]] = [(0.0, 0.0, 0)] * len(flow.boxes)
    y = 0
    for row in sorted(rows):
        wished = {n: [column[s] for s in before.get(n, ())] for n in rows[row]}
        order = sorted(rows[row], key=lambda n: (sum(wished[n]) / len(wished[n]) if wished[n] else 0.0, n))
        heights = [painter.height(flow.boxes[n]) for n in order]
        for at, (number, height) in enumerate(zip(order, heights, strict=True)):
            column[number] = at
            places[number] = (at * (_WIDE + _GAP * 2), y, height)
        y += max(heights) + _LAYER
    around = [_out(places[start], places[end]) for start, end in (*flow.edges, *flow.back)]
    return places, max([_WIDE, *(int(x) + _WIDE for x, _, _ in places), *(int(x) for x in around)]), y


def _edge(places: list[tuple[float, float, int]], start: int, end: int, *, dashed: bool) -> str:
    x0, y0, tall = places[start]
    x1, y1, _ = places[end]
    style = 'fill="none" stroke="#9aa4af"' + (' stroke-dasharray="4 3"' if dashed else "")
    out = _out(places[start], places[end])
    if not out:
        at, to = x0 + _WIDE / 2, x1 + _WIDE / 2
        low = y0 + tall
        return f'<path d="M{at:.0f} {low:.0f}C{at:.0f} {y1:.0f} {to:.0f} {low:.0f} {to:.0f} {y1:.0f}" {style}/>'
    at, to = y0 + tall / 2, y1 + 8
    path = f"M{x0 + _WIDE:.0f} {at:.0f}C{out:.0f} {at:.0f} {out:.0f} {to:.0f} {x1 + _WIDE:.0f} {to:.0f}"
    return f'<path d="{path}" {style}/>'


def _out(start: tuple[float, float, int], end: tuple[float, float, int]) -> float:
    """Return how far right an edge that passes other layers goes round them, further the longer it is; 0 if it passes
    none."""
    (x0, y0, tall), (x1, y1, _) = start, end
    drop = y1 - y0 - tall
    return 0.0 if 0 <= drop <= 2 * _LAYER else max(x0, x1) + _WIDE + min(20 + abs(drop) / 12, 150)


def _several(names: str, most: int) -> str:
    """Return names, or, if they are too long, the first and the number of the others."""
    first, *more = names.split()
    if len(names) <= most or not more:
        return _short(names, most)
    count = f" +{len(more)}"
    return f"{_short(first, most - len(count))}{count}"


def _short(text: str, most: int) -> str:
    """Return a text, or its end if it is too long: the names in a model often share their beginning."""
    return text if len(text) <= most else f"…{text[len(text) - most + 1 :]}"
