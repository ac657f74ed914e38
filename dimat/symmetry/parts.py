"""Tensors that are several in one: layers on top of each other, which a model takes out by number.

A first run of the graph shows that nothing but indices of one axis is ever taken, and that every index is by itself. In
the next run the other axes have units of their own at each index. What still becomes of them together (a result that
has lost the axis of the numbers) ties them to each other again.
"""

from __future__ import annotations

from dimat.symmetry.forms import taken_apart
from dimat.symmetry.layout import Domain
from dimat.symmetry.rules import Value, find_rule, join
from dimat.symmetry.spec import View
from dimat.symmetry.trace import Trace
from dimat.symmetry.views import part_name

_TAKING = (join.select, join.unbind, join.slice_, join.split)
"""Rules of operations that take indices of an axis."""


def only_taken(trace: Trace) -> set[str]:
    """Return the parameters and buffers of which nothing but indices and runs of an axis is ever used."""
    found: dict[str, bool] = {}
    for path in (trace, *trace.others):
        for node in path.nodes:
            source = path.sources.get(node.name)
            if node.op == "placeholder" and source is not None and source.name in path.shapes:
                name = path.canonical(source.name)
                rules = [find_rule(user.target) for user in node.users]
                found[name] = found.get(name, True) and all(rule in _TAKING for rule in rules)
    return {name for name, only in found.items() if only}


def numbered_axis(domain: Domain, value: Value) -> int | None:
    """Return the axis of a tensor, if any, that was taken index by index, others being there to move."""
    for dim, layout in enumerate(value.dims):
        if any(n > 1 for d, n in enumerate(value.shape) if d != dim) and taken_apart(domain, layout):
            return dim
    return None


def parts_of(domain: Domain, name: str, value: Value, dim: int) -> dict[View, Value]:
    """Return the parts of a tensor along an axis of numbers; none where they have been tied to each other since."""
    choice = domain.choice_of(value.dims[dim])
    if choice is None or not any(domain.cases_of(layout) for layout in value.dims):
        return {}
    others = (*value.dims[:dim], *value.dims[dim + 1 :])
    views = (View(part_name(name, dim, number), (name,), dim, number) for number in range(choice.size))
    return {view: Value(tuple(domain.choose(layout, choice, view.index or 0) for layout in others)) for view in views}
