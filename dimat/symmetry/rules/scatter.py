"""Entries put or read by index or mask: the indexed axis is frozen, the others pass."""

from __future__ import annotations

import torch
from torch import fx

from dimat.symmetry.rules.call import Call, NoRule, Result, Value, op_name, rule

_CHOSEN = "chosen by number"
_LOOKED_UP = "looked up by index"
_PICKED = "picked by a mask"


@rule("aten.scatter", "aten.scatter_add", "aten.scatter_reduce")
def scatter(call: Call) -> Result:
    """Along one axis entries go where an index says; along the others all three tensors are permuted alike."""
    x, index, source = call.value("self"), call.value("index"), call.optional("src")
    axis = call.dim("dim", x.ndim)
    others = [index] if source is None or source.ndim == 0 else [index, source]
    for d in range(x.ndim):
        layouts = [x.dims[d], *(value.dims[d] for value in others)]
        if d == axis or len({value.shape[d] for value in (x, *others)}) > 1:
            call.freeze(layouts, _CHOSEN)
            continue
        for layout in layouts[1:]:
            call.domain.unify(layouts[0], layout)
    return x


@rule("aten.index_add", "aten.index_copy", "aten.index_reduce", "aten.index_fill")
def index_into(call: Call) -> Result:
    """Slices of one axis are written or added to by number; the other axes are permuted alike."""
    x, index, source = call.value("self"), call.value("index"), call.optional("source")
    axis = call.dim("dim", x.ndim)
    call.freeze([x.dims[axis], *index.dims], _CHOSEN)
    if source is not None and source.ndim == x.ndim:
        call.freeze([source.dims[axis]], _CHOSEN)
        for d in range(x.ndim):
            if d != axis:
                call.domain.unify(x.dims[d], source.dims[d])
    elif source is not None:
        call.freeze(source.dims, _CHOSEN)
    return x


@rule("aten.one_hot")
def one_hot(call: Call) -> Result:
    """A new last axis numbers the classes."""
    x = call.value("self")
    return Value((*x.dims, call.fixed(call.shape()[-1], "numbers classes")))


@rule("aten.take_along_dim")
def take_along(call: Call) -> Result:
    """As `gather`; the other axes are broadcast."""
    x, numbers = call.value("self"), call.value("indices")
    if call.constant("dim") is None:
        raise NoRule("entries of a flattened tensor")
    axis, shape = call.dim("dim", x.ndim), call.shape()
    call.freeze([x.dims[axis]], _CHOSEN)
    call.freeze([numbers.dims[axis]], _CHOSEN)
    rest = [Value((*value.dims[:axis], *value.dims[axis + 1 :])) for value in (x, numbers)]
    dims = call.broadcast(rest, (*shape[:axis], *shape[axis + 1 :]))
    return Value((*dims[:axis], call.fixed(shape[axis], _CHOSEN), *dims[axis:]))


@rule("aten.where.default")
@rule("aten.nonzero", "aten.nonzero_numpy", "aten.argwhere", "aten.masked_select", "aten.take", "aten.put")
@rule("aten.unique", "aten.unique_dim", "aten.unique_consecutive", "aten._unique", "aten._unique2")
def by_value(call: Call) -> Result:
    """Entries are picked by their value and named by their place, so that no axis moves."""
    call.freeze([layout for value in call.tensors() for layout in value.dims], _PICKED)
    made = [Value(tuple(call.fixed(size, _PICKED) for size in call.shape(i))) for i in range(call.output_count)]
    return list(made) if isinstance(call.node.meta["val"], (tuple, list)) else made[0]


@rule("aten.repeat_interleave.Tensor", "aten.repeat_interleave.self_Tensor")
def repeated(call: Call) -> Result:
    """Every entry of one axis repeated as often as a tensor says."""
    values = call.tensors()
    call.freeze(values[-1].dims, "counts of copies")
    if "self" not in call.arguments or call.constant("dim") is None:
        call.freeze([layout for value in values for layout in value.dims], "counts of copies")
        return Value((call.fixed(call.shape()[0], "counts of copies"),))
    x = call.value("self")
    axis = call.dim("dim", x.ndim)
    call.freeze([x.dims[axis]], "counts of copies")
    copies = call.fixed(call.shape()[axis], "counts of copies")
    return Value((*x.dims[:axis], copies, *x.dims[axis + 1 :]))


@rule("aten.masked_scatter")
def masked_scatter(call: Call) -> Result:
    """Entries of a source are used up one by one, in row-major order of the mask.

    Where the mask is one column repeated along the last axis, the source's rows are used up, and columns go along.
    """
    x, mask, source = call.value("self"), call.value("mask"), call.value("source")
    last = source.ndim > 1 and x.ndim > 1 and source.shape[-1] == x.shape[-1] and _is_column(call.arguments["mask"])
    if not last:
        call.freeze([layout for value in (x, mask, source) for layout in value.dims], _PICKED)
        return Value(tuple(call.fixed(size, _PICKED) for size in call.shape()))
    call.freeze([*x.dims[:-1], *mask.dims[:-1], *source.dims[:-1]], _PICKED)
    call.domain.unify(x.dims[-1], source.dims[-1])
    return x


_SAME_ALONG_LAST = {
    *(f"aten.{name}" for name in ("expand", "expand_as", "broadcast_to", "to", "_to_copy", "clone", "contiguous")),
    *("aten.alias", "aten.detach", "aten.bitwise_not", "aten.logical_not"),
}
"""Operations whose result is the same along its last axis where that of their first argument is."""


def _is_column(node: fx.Node) -> bool:
    """Tell whether a mask is the same along its last axis because it was expanded from one column."""
    while node.op == "call_function":
        if node.meta["val"].ndim and node.meta["val"].shape[-1] == 1:
            return True
        if op_name(node.target).rpartition(".")[0] not in _SAME_ALONG_LAST:
            return False
        node = node.all_input_nodes[0]
    return False


@rule("aten.embedding_bag", "aten._embedding_bag", "aten._embedding_bag_forward_only")
def embedding_bag(call: Call) -> Result:
    """Rows are looked up by number and combined within a bag; columns pass."""
    weight, indices = call.value("weight"), call.value("indices")
    given = [value for name in ("offsets", "per_sample_weights") if (value := call.optional(name)) is not None]
    call.freeze([weight.dims[0], *indices.dims, *(layout for value in given for layout in value.dims)], _LOOKED_UP)
    outputs: list[Value | None] = [Value((call.fixed(call.shape()[0], _LOOKED_UP), weight.dims[1]))]
    others = [call.shape(number) for number in range(1, call.output_count)]
    outputs += [Value(tuple(call.fixed(size, _LOOKED_UP) for size in shape)) for shape in others]
    return outputs


def is_mask(node: object) -> bool:
    """Tell whether an index is a mask."""
    return isinstance(node, fx.Node) and node.meta["val"].dtype in (torch.bool, torch.uint8)


def picked(call: Call, x: Value) -> Value:
    """Return `x` indexed by one mask: the axes under it become one, of as many entries as it picks."""
    given = call.arguments["indices"]
    places = [position for position, entry in enumerate(given) if entry is not None]
    (mask,) = call.tensors("indices")
    if len(places) != 1:
        raise NoRule("indexing by a mask and numbers at once")
    start, stop = places[0], places[0] + mask.ndim
    call.freeze([*x.dims[start:stop], *mask.dims], _PICKED)
    return Value((*x.dims[:start], call.fixed(call.shape()[start], _PICKED), *x.dims[stop:]))


def put_by_mask(call: Call, x: Value) -> Value:
    """Return `x` with one value, or one slice, written wherever a mask says so."""
    given, values = call.arguments["indices"], call.value("values")
    places = [position for position, entry in enumerate(given) if entry is not None]
    (mask,) = call.tensors("indices")
    if len(places) != 1:
        raise NoRule("assignment by a mask and numbers at once")
    start, stop = places[0], places[0] + mask.ndim
    rest = Value(x.dims[stop:])
    if values.ndim <= rest.ndim or set(values.shape) == {1}:
        for one, other in zip(x.dims[start:stop], mask.dims):
            call.domain.unify(one, other)
        call.broadcast([rest, Value(values.dims[max(values.ndim - rest.ndim, 0) :])], rest.shape)
        return x
    call.freeze([*x.dims[start:stop], *mask.dims], _PICKED)
    kept = values.dims[values.ndim - rest.ndim :]
    call.freeze(values.dims[: values.ndim - rest.ndim], _PICKED)
    call.broadcast([rest, Value(kept)], rest.shape)
    return x
