"""Concatenation and stacking, their inverses (split, slice, select), constant padding."""

from __future__ import annotations

from dimat.symmetry.atoms import ONE, Layout, layout_size
from dimat.symmetry.rules.call import Call, NoRule, Result, Value, op_name, rule


@rule("aten.cat", "aten.concat", "aten.concatenate")
def cat(call: Call) -> Result:
    """One axis is the concatenation of the inputs'; the others are permuted alike."""
    values = [value for value in call.tensors("tensors") if value.shape != (0,)]
    return _joined(call, values, call.dim("dim", values[0].ndim))


def _joined(call: Call, values: list[Value], axis: int) -> Value:
    dims = list(values[0].dims)
    for value in values[1:]:
        for position, layout in enumerate(value.dims):
            if position != axis:
                call.domain.unify(dims[position], layout)
    dims[axis] = call.domain.concat(value.dims[axis] for value in values)
    return Value(tuple(dims))


@rule("aten.column_stack", "aten.hstack", "aten.vstack", "aten.row_stack")
def side_by_side(call: Call) -> Result:
    """As `cat` does, of vectors as columns (rows) of a matrix, or along their only axis."""
    values = call.tensors("tensors")
    name = op_name(call.node.target).split(".")[1]
    if any(not value.ndim for value in values):
        raise NoRule("numbers as rows or columns")
    if name == "hstack":
        return _joined(call, values, min(values[0].ndim - 1, 1))
    columns = name == "column_stack"
    raised = (Value((*x.dims, ONE) if columns else (ONE, *x.dims)) if x.ndim == 1 else x for x in values)
    return _joined(call, [*raised], int(columns))


@rule("aten.stack")
def stack(call: Call) -> Result:
    """A new axis that numbers the inputs, whose axes are permuted alike."""
    values = call.tensors("tensors")
    axis = call.dim("dim", values[0].ndim + 1)
    dims = list(call.broadcast(values, values[0].shape))
    dims.insert(axis, call.fixed(len(values), "numbers stacked tensors"))
    return Value(tuple(dims))


@rule(
    "aten.split",
    "aten.split_with_sizes",
    "aten.chunk",
    "aten.tensor_split",
    "aten.unsafe_chunk",
    "aten.unsafe_split",
    "aten.unsafe_split_with_sizes",
)
def split(call: Call) -> Result:
    """An axis is cut into pieces, one after the other."""
    x = call.value("self")
    axis = call.dim("dim", x.ndim)
    pieces: list[Value | None] = []
    rest = x.dims[axis]
    if call.domain.choice_of(rest) and all(call.shape(i)[axis] == 1 for i in range(call.output_count)):
        return [_with(call.taken(x, axis, i), axis, ONE, insert=True) for i in range(call.output_count)]
    for number in range(call.output_count):
        piece, rest = call.domain.cut(rest, call.shape(number)[axis])
        pieces.append(_with(x, axis, piece))
    if layout_size(rest):
        raise NoRule("pieces do not cover the axis")
    return pieces


@rule("aten.unbind")
def unbind(call: Call) -> Result:
    """Every index of an axis becomes a tensor of its own, so the axis stays as it is."""
    x = call.value("self")
    axis = call.dim("dim", x.ndim)
    return [call.taken(x, axis, index) for index in range(call.output_count)]


@rule("aten.select")
def select(call: Call) -> Result:
    """One index of an axis is taken: that index stays, the rest of the axis is free."""
    x = call.value("self")
    axis = call.dim("dim", x.ndim)
    return call.taken(x, axis, int(call.constant("index")) % max(x.shape[axis], 1))


@rule("aten.slice", "aten.narrow")
def slice_(call: Call) -> Result:
    """A run of an axis; with a step that divides it, one index of the inner of two factors."""
    x = call.value("self")
    axis = call.dim("dim", x.ndim)
    size, length = x.shape[axis], call.shape()[axis]
    start = int(call.constant("start", 0))
    start = min(max(start + size if start < 0 else start, 0), size)
    step = int(call.constant("step", 1))
    if step != 1 and size % step:
        call.freeze([x.dims[axis]], "slice with a step")
        return _with(x, axis, call.fixed(length, "slice with a step"))
    if step != 1:
        outer, inner = call.domain.factor(x.dims[axis], [size // step, step])
        call.domain.slice(inner, start % step, start % step + 1)
        return _with(x, axis, call.domain.slice(outer, start // step, start // step + length))
    if length == 1 and call.domain.choice_of(x.dims[axis]):
        return _with(call.taken(x, axis, start), axis, ONE, insert=True)
    return _with(x, axis, call.domain.slice(x.dims[axis], start, start + length))


@rule("aten.pad", "aten.constant_pad_nd")
def pad(call: Call) -> Result:
    """Constant entries before and after an axis are all equal: a free piece each (negative pads cut)."""
    x = call.value("self")
    if call.constant("mode", "constant") != "constant":
        return _pad_positions(call, x)
    widths = [int(width) for width in call.constant("pad")]
    dims = list(x.dims)
    for back, (before, after) in enumerate(zip(widths[::2], widths[1::2])):
        axis = x.ndim - 1 - back
        layout = dims[axis]
        size = layout_size(layout)
        layout = call.domain.slice(layout, max(-before, 0), size - max(-after, 0))
        parts = (call.domain.fresh(max(before, 0)), layout, call.domain.fresh(max(after, 0)))
        dims[axis] = call.domain.concat(parts)
    return Value(tuple(dims))


@rule("aten.slice_scatter", "aten.select_scatter")
def scatter(call: Call) -> Result:
    """Not covered: rare, and in-place assignment is traced as a copy into a slice."""
    raise NoRule("scatter into a slice")


def _pad_positions(call: Call, x: Value) -> Result:
    """Reflection and the like: the padded axes are positions."""
    kept = x.ndim - len(call.constant("pad")) // 2
    call.freeze(x.dims[kept:], "padded by its own entries")
    fixed = (call.fixed(size, "padded by its own entries") for size in call.shape()[kept:])
    return Value((*x.dims[:kept], *fixed))


def _with(x: Value, axis: int, layout: Layout, *, insert: bool = False) -> Value:
    """Return `x` with one axis replaced, or a new one before it."""
    return Value((*x.dims[:axis], layout, *x.dims[axis if insert else axis + 1 :]))
