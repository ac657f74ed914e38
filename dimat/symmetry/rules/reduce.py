"""Reductions drop an axis; operations that depend on the order along an axis freeze it."""

from __future__ import annotations

from dimat.symmetry.atoms import ONE
from dimat.symmetry.rules.call import Call, NoRule, Result, Value, op_name, rule
from dimat.symmetry.rules.scatter import is_mask, picked, put_by_mask
from dimat.symmetry.rules.shape import ordered


@rule(
    *(f"aten.{name}" for name in ("mean", "sum", "amax", "amin", "prod", "var", "std", "logsumexp", "norm")),
    *(f"aten.{name}" for name in ("any", "all", "max", "min", "linalg_vector_norm", "nansum", "nanmean")),
    *(f"aten.{name}" for name in ("linalg_norm", "linalg_matrix_norm", "frobenius_norm", "nuclear_norm")),
    *(f"aten.{name}" for name in ("special_logsumexp", "aminmax")),
    "aten.var_mean",
    "aten.std_mean",
    "aten.count_nonzero",
    "aten._is_all_true",
    "aten._is_any_true",
)
def reduction(call: Call) -> Result:
    """The order of what is summed up does not matter."""
    x = call.tensors()[0]
    if "other" in call.arguments:
        return Value(call.broadcast(call.tensors(), call.shape()))
    axes = call.dims("dim", x.ndim)
    if call.output_count > 1 and "indices" in call.result_names and call.uses(1):
        call.freeze([x.dims[d] for d in axes], "the index of an entry is used")
    call.mix([x.dims[d] for d in axes], [layout for d, layout in enumerate(x.dims) if d not in axes])
    keep = bool(call.constant("keepdim", False))
    dims = tuple(ONE if d in axes else layout for d, layout in enumerate(x.dims) if keep or d not in axes)
    return Value(dims) if call.output_count == 1 else [Value(dims) for _ in range(call.output_count)]


@rule("aten.quantile", "aten.nanquantile")
def quantile(call: Call) -> Result:
    """Order does not matter; several quantiles are an axis before all others."""
    x, shape = call.value("self"), call.shape()
    axes = list(range(x.ndim)) if call.constant("dim") is None else [call.dim("dim", x.ndim)]
    call.mix([x.dims[d] for d in axes], [layout for d, layout in enumerate(x.dims) if d not in axes])
    keep = bool(call.constant("keepdim", False))
    dims = tuple(ONE if d in axes else layout for d, layout in enumerate(x.dims) if keep or d not in axes)
    several = call.optional("q")
    if several is not None and several.ndim:
        call.freeze(several.dims, "numbers quantiles")
        dims = (call.fixed(shape[0], "numbers quantiles"), *dims)
    return Value(dims)


@rule("aten.argmax", "aten.argmin", "aten.topk", "aten.sort", "aten.argsort", "aten.kthvalue", "aten.median")
@rule("aten.mode", "aten.msort", "aten.nanmedian")
def by_rank(call: Call) -> Result:
    """Entries are put in the order of their values, or named by their place along the axis where it is used too."""
    x = call.tensors()[0]
    name = op_name(call.node.target).split(".")[1]
    if call.output_count == 2 and not call.uses(1):
        return _ranked(call, x, call.dim("dim", x.ndim))
    if call.output_count == 1 and name in ("median", "nanmedian"):
        call.mix(x.dims, [])
        return Value(())
    if name == "msort":
        return _ranked(call, x, 0)
    axes = [call.dim("dim", x.ndim)] if call.constant("dim") is not None or "k" in call.arguments else None
    if "dim" in call.arguments and axes is None:
        axes = list(range(x.ndim)) if call.constant("dim") is None else [call.dim("dim", x.ndim)]
    return ordered(call, x, axes if axes is not None else list(range(x.ndim)))


@rule("aten.cumsum", "aten.cumprod", "aten.logcumsumexp", "aten.cummax", "aten.cummin", "aten.diff")
def along(call: Call) -> Result:
    """Entries are taken up one after the other."""
    x = call.tensors()[0]
    return ordered(call, x, [call.dim("dim", x.ndim)])


@rule("aten.tril", "aten.triu")
def triangle(call: Call) -> Result:
    """Rows and columns are compared by place."""
    x = call.tensors()[0]
    return ordered(call, x, [x.ndim - 2, x.ndim - 1])


@rule("aten.embedding")
def embedding(call: Call) -> Result:
    """Rows are looked up by number, so their order is fixed; columns pass."""
    weight, indices = call.value("weight"), call.value("indices")
    call.look_up(weight.dims[0], indices.dims, "indices", weight.dims[1:])
    return Value((*indices.dims, *weight.dims[1:]))


@rule("aten.index_select")
def index_select(call: Call) -> Result:
    """As an embedding, along any axis."""
    x, index = call.value("self"), call.value("index")
    axis = call.dim("dim", x.ndim)
    call.look_up(x.dims[axis], index.dims, "index", (*x.dims[:axis], *x.dims[axis + 1 :]))
    return Value((*x.dims[:axis], *index.dims, *x.dims[axis + 1 :]))


@rule("aten.index")
def index(call: Call) -> Result:
    """Index tensors for some neighbouring axes: those are fixed, the others pass."""
    x = call.value("self")
    given = call.arguments["indices"]
    if any(is_mask(node) for node in given):
        return picked(call, x)
    indexed = [position for position, entry in enumerate(given) if entry is not None]
    indices = call.tensors("indices")
    if not indexed or len(indices) != len(indexed) or indexed[-1] - indexed[0] + 1 != len(indexed):
        raise NoRule("advanced indexing of axes that are not neighbours")
    shape = call.shape()
    count = len(shape) - (x.ndim - len(indexed))
    first = indexed[0]
    looked_up = call.broadcast(indices, shape[first : first + count])
    if len(indexed) == 1:
        call.look_up(x.dims[first], looked_up, "indices", (*x.dims[:first], *x.dims[first + 1 :]))
    else:
        call.freeze([x.dims[d] for d in indexed], "chosen by number")
    return Value((*x.dims[:first], *looked_up, *x.dims[indexed[-1] + 1 :]))


@rule("aten.histc", "aten.bincount", "aten.bucketize", "aten.searchsorted")
def counted(call: Call) -> Result:
    """Entries are counted or placed by their value."""
    reason = "counted by value"
    call.freeze([layout for value in call.tensors() for layout in value.dims], reason)
    return Value(tuple(call.fixed(size, reason) for size in call.shape()))


@rule("aten.index_put")
def index_put(call: Call) -> Result:
    """Entries at the given numbers of the first axes are replaced (or added to): these are fixed, the others pass."""
    x, values = call.value("self"), call.value("values")
    given = call.arguments["indices"]
    indices = call.tensors("indices")
    if any(is_mask(node) for node in given):
        return put_by_mask(call, x)
    if len(indices) != len(given) or not indices:
        raise NoRule("assignment to places of axes that are not the first ones")
    call.freeze([*x.dims[: len(indices)], *(layout for value in indices for layout in value.dims)], "chosen by number")
    rest = x.dims[len(indices) :]
    call.broadcast([Value(values.dims[max(values.ndim - len(rest), 0) :]), Value(rest)], Value(rest).shape)
    call.freeze(values.dims[: max(values.ndim - len(rest), 0)], "chosen by number")
    return x


@rule("aten.gather")
def gather(call: Call) -> Result:
    """Along one axis entries are looked up by number; the others are permuted alike, where sizes agree."""
    x, numbers = call.value("self"), call.value("index")
    axis = call.dim("dim", x.ndim)
    call.freeze([x.dims[axis]], call.by_number("index"))
    for d in range(x.ndim):
        if d == axis:
            continue
        if x.shape[d] == numbers.shape[d]:
            call.domain.unify(x.dims[d], numbers.dims[d])
        else:
            call.freeze([x.dims[d], numbers.dims[d]], "chosen by number")
    return numbers


def _ranked(call: Call, x: Value, axis: int) -> Result:
    """Return values by rank along an axis, whose entries are combined; the numbers beside them are not used."""
    call.mix([x.dims[axis]], [layout for d, layout in enumerate(x.dims) if d != axis])
    outputs: list[Value | None] = []
    for number in range(call.output_count):
        shape = call.shape(number)
        rank = (call.fixed(shape[axis], "order of values"),) if len(shape) == x.ndim else ()
        outputs.append(Value((*x.dims[:axis], *rank, *x.dims[axis + 1 :])))
    return outputs[0] if len(outputs) == 1 else outputs
