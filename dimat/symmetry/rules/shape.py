"""Views, and moves of axes and entries: values only change places, or their axes are frozen."""

from __future__ import annotations

from dimat.symmetry.atoms import ONE, Atom, Layout, layout_size
from dimat.symmetry.rules.call import Call, NoRule, Result, Value, op_name, rule


@rule(
    "aten.view",
    "aten.reshape",
    "aten.flatten",
    "aten.unflatten",
    "aten._unsafe_view",
    "aten.view_as",
    "aten.reshape_as",
    "aten.ravel",
)
def reshape(call: Call) -> Result:
    """A row-major view of another shape."""
    x = call.tensors()[0]
    if "dtype" in call.arguments:
        raise NoRule("view of the memory as another dtype")
    before = _still(call, x)
    made = Value(tuple(call.domain.reshape(x.dims, call.shape())))
    after = _still(call, made)
    for atom in before - after:
        if any(part.size < atom.size for part in after - before):
            # split, its parts may change places, and its indices have other numbers then
            call.mix([((atom,),)], x.dims)
    return made


def _still(call: Call, x: Value) -> set[Atom]:
    """Return the frozen atoms of a tensor's axes."""
    return {atom for layout in x.dims for atom in call.domain.leaves(layout) if atom.frozen}


@rule("aten.squeeze", "aten.unsqueeze")
def ones(call: Call) -> Result:
    """Axes of size 1 come or go; the others keep their order."""
    others = iter(layout for layout in call.value("self").dims if layout_size(layout) != 1)
    return Value(tuple(ONE if size == 1 else next(others) for size in call.shape()))


@rule("aten.permute", "aten.movedim", "aten.transpose", "aten.swapaxes", "aten.t", "aten.numpy_T")
@rule("aten.mT", "aten.mH", "aten.adjoint", "aten.swapdims", "aten.moveaxis", "aten.matrix_H")
def permute(call: Call) -> Result:
    """Axes change places."""
    x = call.value("self")
    order = list(range(x.ndim))
    arguments = call.arguments
    if "dims" in arguments:
        order = call.dims("dims", x.ndim)
    elif "source" in arguments:
        source, target = call.dims("source", x.ndim), call.dims("destination", x.ndim)
        order = [d for d in order if d not in source]
        for to, place in sorted(zip(target, source)):
            order.insert(to, place)
    elif op_name(call.node.target).split(".")[1] in ("mT", "mH", "adjoint"):
        order[-2:] = order[:-3:-1]
    elif len(arguments) == 1:
        order = order[::-1]  # all of them: `t` is of matrices, `.T` of any
    else:
        names = ("axis0", "axis1") if "axis0" in arguments else ("dim0", "dim1")
        first, second = (call.dim(name, x.ndim) for name in names)
        order[first], order[second] = order[second], order[first]
    return Value(tuple(x.dims[d] for d in order))


@rule("aten.meshgrid")
def meshgrid(call: Call) -> Result:
    """Each vector along an axis of its own, and repeated along the others ("xy" has the first two axes swapped)."""
    vectors = call.tensors("tensors")
    places = list(range(len(vectors)))
    if call.constant("indexing", "ij") == "xy" and len(places) > 1:
        places[:2] = 1, 0
    made: list[Value | None] = []
    for vector, place in zip(vectors, places):
        dims = [call.domain.fresh(size) for size in call.shape()]
        dims[place] = vector.dims[0] if vector.ndim else ONE
        made.append(Value(tuple(dims)))
    return made


@rule("aten.expand", "aten.expand_as", "aten.broadcast_to")
def expand(call: Call) -> Result:
    """An axis of size 1 repeated: its entries are equal, so any permutation of them does nothing."""
    return Value(call.broadcast([call.tensors()[0]], call.shape()))


@rule("aten.broadcast_tensors")
def broadcast_tensors(call: Call) -> Result:
    """All expanded to one shape; axes that meet are permuted alike."""
    values = call.tensors("tensors")
    made = Value(call.broadcast(values, call.shape()))
    return [made for _ in values]


@rule("aten.repeat", "aten.tile")
def repeat(call: Call) -> Result:
    """An axis repeated as a whole: (copies, axis), the copies being equal."""
    x = call.value("self")
    shape = call.shape()
    dims: list[Layout] = []
    for position, size in enumerate(shape):
        own = position - (len(shape) - x.ndim)
        axis = x.dims[own] if own >= 0 else ONE
        dims.append(call.domain.merge([call.domain.fresh(size // layout_size(axis)), axis]))
    return Value(tuple(dims))


@rule("aten.repeat_interleave.self_int")
def repeat_interleave(call: Call) -> Result:
    """Every entry repeated: (axis, copies)."""
    x = call.value("self")
    if call.constant("dim") is None:
        raise NoRule("repeat_interleave of a flattened tensor")
    axis = call.dim("dim", x.ndim)
    copies = call.domain.fresh(int(call.constant("repeats")))
    dims = list(x.dims)
    dims[axis] = call.domain.merge([x.dims[axis], copies])
    return Value(tuple(dims))


@rule("aten.diagonal", "aten.linalg_diagonal")
def diagonal(call: Call) -> Result:
    """Places where two axes have the same number."""
    x = call.tensors()[0]
    names = ("dim1", "dim2")
    if any(call.constant(name) is None for name in names):
        raise NoRule("a diagonal of axes that are not given")
    taken = [call.dim(name, x.ndim) for name in names]
    rest = tuple(layout for d, layout in enumerate(x.dims) if d not in taken)
    call.freeze([x.dims[d] for d in taken], "diagonal")
    return Value((*rest, call.fixed(call.shape()[-1], "diagonal")))


@rule("aten.diag_embed")
def diag_embed(call: Call) -> Result:
    """An axis becomes the diagonal of a matrix: its rows and columns are permuted as the axis is."""
    x = call.value("self")
    places = {call.dim("dim1", x.ndim + 1), call.dim("dim2", x.ndim + 1)}
    if call.constant("offset", 0) or places != {x.ndim - 1, x.ndim}:
        raise NoRule("a diagonal beside the main one")
    return Value((*x.dims, x.dims[-1]))


@rule("aten.unfold")
def unfold(call: Call) -> Result:
    """Windows along an axis, which overlap; a new last axis runs inside them."""
    x, shape = call.value("self"), call.shape()
    axis = call.dim("dimension", x.ndim)
    call.freeze([x.dims[axis]], "windows along an axis")
    windows, inside = (call.fixed(size, "windows along an axis") for size in (shape[axis], shape[-1]))
    return Value((*x.dims[:axis], windows, *x.dims[axis + 1 :], inside))


@rule("aten.flip", "aten.roll", "aten.rot90")
def moved(call: Call) -> Result:
    """Entries change places by a fixed rule; two axes that are turned may change places too."""
    x = call.tensors()[0]
    return ordered(call, x, call.dims("dims", x.ndim))


def ordered(call: Call, x: Value, axes: list[int]) -> Result:
    """Freeze axes; outputs keep the others, and fixed axes (of the output's size, if any) for these."""
    reason = "order along the axis matters"
    call.freeze([x.dims[d] for d in axes], reason)
    outputs: list[Value | None] = []
    for number in range(call.output_count):
        shape = call.shape(number)
        if len(shape) == x.ndim:
            dims = [call.fixed(shape[d], reason) if d in axes else x.dims[d] for d in range(x.ndim)]
        else:
            dims = [layout for d, layout in enumerate(x.dims) if d not in axes]
        outputs.append(Value(tuple(dims)))
    return outputs[0] if len(outputs) == 1 else outputs
