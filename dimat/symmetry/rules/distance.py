"""Distances, inner products and norms: the summed axis moves alike in both tensors."""

from __future__ import annotations

from dimat.symmetry.atoms import ONE
from dimat.symmetry.rules.call import Call, NoRule, Result, Value, rule


@rule("aten.cdist", "aten._cdist_forward", "aten._euclidean_dist")
def pairs(call: Call) -> Result:
    """x1 (…, P, M) and x2 (…, R, M) give (…, P, R)."""
    a, b = call.tensors()
    call.domain.unify(a.dims[-1], b.dims[-1])
    call.mix(a.dims[-1:], (*a.dims[:-1], *b.dims[:-1]))
    leading = call.broadcast([Value(a.dims[:-2]), Value(b.dims[:-2])], call.shape()[:-2])
    return Value((*leading, a.dims[-2], b.dims[-2]))


@rule("aten.cosine_similarity", "aten.pairwise_distance", "aten.linalg_vecdot")
def by_pair(call: Call) -> Result:
    """Both tensors are broadcast to each other, and one axis is summed over."""
    a, b = call.tensors()
    count = max(a.ndim, b.ndim)
    padded = [(1,) * (count - value.ndim) + value.shape for value in (a, b)]
    dims = call.broadcast([a, b], [max(sizes) for sizes in zip(*padded)])
    axis = call.dim("dim", count) if "dim" in call.arguments else count - 1
    others = (*dims[:axis], *dims[axis + 1 :])
    call.mix([dims[axis]], others)
    keep = (ONE,) if call.constant("keepdim", False) else ()
    return Value((*dims[:axis], *keep, *dims[axis + 1 :]))


@rule("aten.dist")
def distance(call: Call) -> Result:
    """The norm of a difference."""
    a, b = call.tensors()
    if a.shape != b.shape:
        raise NoRule("distance of tensors of different shapes")
    dims = call.broadcast([a, b], a.shape)
    call.mix(dims, [])
    return Value(())


@rule("aten.vdot", "aten.inner")
def inner(call: Call) -> Result:
    """The last axes are summed over together."""
    a, b = call.tensors()
    if not a.ndim or not b.ndim:
        return a if a.ndim else b
    call.domain.unify(a.dims[-1], b.dims[-1])
    call.mix(a.dims[-1:], (*a.dims[:-1], *b.dims[:-1]))
    return Value((*a.dims[:-1], *b.dims[:-1]))


@rule("aten.tensordot")
def tensordot(call: Call) -> Result:
    """Listed axes are summed over in pairs; the others of the first come before those of the second."""
    a, b = call.tensors()
    first, second = (
        [int(d) % value.ndim for d in call.constant(name)] for name, value in (("dims_self", a), ("dims_other", b))
    )
    for one, other in zip(first, second, strict=True):
        call.domain.unify(a.dims[one], b.dims[other])
    kept = [layout for d, layout in enumerate(a.dims) if d not in first]
    kept += [layout for d, layout in enumerate(b.dims) if d not in second]
    call.mix([a.dims[d] for d in first], kept)
    return Value(tuple(kept))


@rule("aten.kron")
def kron(call: Call) -> Result:
    """Each axis is a product, the first tensor's index outside."""
    a, b = call.tensors()
    count = max(a.ndim, b.ndim)
    padded = [(ONE,) * (count - value.ndim) + value.dims for value in (a, b)]
    return Value(tuple(call.domain.merge([one, other]) for one, other in zip(*padded)))


@rule("aten.linalg_inv", "aten.inverse", "aten.linalg_pinv", "aten.pinverse")
def inverse(call: Call) -> Result:
    """The inverse of P A Q is Q⁻¹ A⁻¹ P⁻¹: rows and columns change places."""
    x = call.tensors()[0]
    call.mix(x.dims[-2:], x.dims[:-2])
    return Value((*x.dims[:-2], x.dims[-1], x.dims[-2]))


@rule("aten.matrix_exp", "aten.linalg_matrix_exp", "aten.matrix_power", "aten.linalg_matrix_power")
def series(call: Call) -> Result:
    """Products of a matrix with itself, so that rows are permuted as columns are."""
    x = call.tensors()[0]
    call.domain.unify(x.dims[-2], x.dims[-1])
    call.mix(x.dims[-2:], x.dims[:-2])
    return x


@rule("aten.linalg_det", "aten.det", "aten.trace", "aten.logdet", "aten.linalg_slogdet", "aten.slogdet")
def one_number(call: Call) -> Result:
    """One number of a matrix, or its sign and size, unchanged where rows are permuted as columns are."""
    x = call.tensors()[0]
    call.domain.unify(x.dims[-2], x.dims[-1])
    call.mix(x.dims[-2:], x.dims[:-2])
    made = Value(x.dims[:-2])
    return made if call.output_count == 1 else [made for _ in range(call.output_count)]


@rule("aten.linalg_solve")
def solve(call: Call) -> Result:
    """A (…, R, C) and B (…, R, K) give X (…, C, K)."""
    a, b = call.value("A"), call.value("B")
    if not call.constant("left", True) or a.ndim != b.ndim:
        raise NoRule("solving from the right, or for vectors")
    call.domain.unify(a.dims[-2], b.dims[-2])
    leading = call.broadcast([Value(a.dims[:-2]), Value(b.dims[:-2])], call.shape()[:-2])
    call.mix(a.dims[-2:], (*leading, b.dims[-1]))
    return Value((*leading, a.dims[-1], b.dims[-1]))


@rule("aten.cross", "aten.linalg_cross")
def cross(call: Call) -> Result:
    """The three entries of a vector have their places."""
    dims = call.broadcast(call.tensors(), call.shape())
    call.freeze([dims[call.dim("dim", len(dims)) if call.constant("dim") is not None else -1]], "coordinates")
    return Value(dims)
