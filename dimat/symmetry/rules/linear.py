"""Products of matrices: contracted axes are permuted alike, the others pass to the result."""

from __future__ import annotations

from dimat.symmetry.atoms import Layout, layout_size
from dimat.symmetry.rules.call import Call, NoRule, Result, Value, rule


@rule("aten.linear")
def linear(call: Call) -> Result:
    """y = x Wᵀ + b with W of shape (out, in)."""
    x, weight, bias = call.value("input"), call.value("weight"), call.optional("bias")
    call.domain.unify(x.dims[-1], weight.dims[-1])
    call.mix(x.dims[-1:], (*x.dims[:-1], *weight.dims[:-1]))
    out = weight.dims[:-1]
    if bias is not None and out:
        call.domain.unify(out[0], bias.dims[0])
    return Value((*x.dims[:-1], *out))


@rule("aten.mm", "aten.bmm", "aten.matmul", "aten.dot", "aten.mv")
def matmul(call: Call) -> Result:
    """The last axis of the first with the last but one of the second (its only one, if a vector)."""
    a, b = call.tensors()
    return Value(_matmul(call, a, b))


@rule("aten.addmm", "aten.baddbmm", "aten.addmv")
def addmm(call: Call) -> Result:
    """A matrix product plus a tensor that is broadcast to it."""
    added, a, b = call.tensors()
    product = Value(_matmul(call, a, b))
    return Value(call.broadcast([product, added], call.shape()))


@rule("aten.addbmm")
def addbmm(call: Call) -> Result:
    """Products of matrices, summed over the batch, plus a tensor that is broadcast to the sum."""
    added, a, b = call.tensors()
    _, *product = _matmul(call, a, b)
    call.mix(a.dims[:1], product)
    return Value(call.broadcast([Value(tuple(product)), added], call.shape()))


@rule("aten.addr")
def addr(call: Call) -> Result:
    """All pairs of entries of two vectors, plus a tensor that is broadcast to them."""
    added, a, b = call.tensors()
    return Value(call.broadcast([Value((*a.dims, *b.dims)), added], call.shape()))


@rule("aten.linalg_multi_dot", "aten.chain_matmul")
def chain(call: Call) -> Result:
    """A product of many matrices, of which the first may be a row and the last a column."""
    product, *others = call.tensors()
    for other in others:
        product = Value(_matmul(call, product, other))
    return product


@rule("aten.outer", "aten.ger")
def outer(call: Call) -> Result:
    """All pairs of entries of two vectors."""
    a, b = call.tensors()
    return Value((*a.dims, *b.dims))


@rule("aten.bilinear")
def bilinear(call: Call) -> Result:
    """y_o = x1ᵀ W_o x2 + b_o."""
    x1, x2, weight = call.value("input1"), call.value("input2"), call.value("weight")
    bias = call.optional("bias")
    call.domain.unify(x1.dims[-1], weight.dims[1])
    call.domain.unify(x2.dims[-1], weight.dims[2])
    call.mix(x1.dims[-1:], (*x1.dims[:-1], *weight.dims))
    call.mix(x2.dims[-1:], (*x2.dims[:-1], *weight.dims))
    if bias is not None:
        call.domain.unify(weight.dims[0], bias.dims[0])
    leading = call.broadcast([Value(x1.dims[:-1]), Value(x2.dims[:-1])], call.shape()[:-1])
    return Value((*leading, weight.dims[0]))


@rule("aten.einsum")
def einsum(call: Call) -> Result:
    """Axes with the same letter are permuted alike, those of an ellipsis by broadcasting (no letter twice in one)."""
    equation = str(call.constant("equation")).replace(" ", "")
    values = call.tensors("tensors")
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    if len(values) != len(terms):
        raise NoRule("einsum of what is no tensor")
    if not arrow:
        letters = sorted({letter for term in terms for letter in term if letter != "."})
        output = ("..." if "..." in inputs else "") + "".join(x for x in letters if inputs.count(x) == 1)
    free = "".join(letter for letter in map(chr, range(0x391, 0x3C9)) if letter.isalpha())  # no letters of einsum's own
    counts = [value.ndim - len(term) + 3 if "..." in term else 0 for term, value in zip(terms, values)]
    named = free[: max(counts)]
    terms = [term.replace("...", named[len(named) - count :]) for term, count in zip(terms, counts)]
    output = output.replace("...", named)
    if any(len(set(term)) < len(term) for term in terms):
        raise NoRule("einsum of a diagonal")
    axes: dict[str, Layout] = {}
    for term, value in zip(terms, values):
        for letter, layout in zip(term, value.dims, strict=True):
            known = axes.get(letter)
            if known is None or layout_size(known) == 1:
                axes[letter] = layout
            elif layout_size(layout) != 1:
                call.domain.unify(known, layout)
    call.mix([axes[letter] for letter in axes if letter not in output], [axes[letter] for letter in output])
    return Value(tuple(axes[letter] for letter in output))


@rule("aten._grouped_mm", "aten._scaled_grouped_mm", "transformers.grouped_mm_fallback")
def grouped_mm(call: Call) -> Result:
    """Rows of x (S, K) in groups, each with its own matrix of (E, K, N); rows are assigned to groups by number."""
    tensors = call.tensors()
    x, weight = tensors[:2]
    if x.ndim != 2 or weight.ndim != 3 or call.optional("bias") is not None:
        raise NoRule("grouped matrix product of other than rows with a matrix for each group")
    for layout in (x.dims[0], weight.dims[0], *(layout for t in tensors[2:] for layout in t.dims)):
        call.domain.freeze(layout, call.why("which rows are whose"))
    call.look_up(weight.dims[0], x.dims[:1], "offs", weight.dims[1:])
    call.domain.unify(x.dims[1], weight.dims[1])
    call.mix(x.dims[1:], (x.dims[0], weight.dims[2]))
    return Value((x.dims[0], weight.dims[2]))


def _matmul(call: Call, a: Value, b: Value) -> tuple[Layout, ...]:
    call.domain.unify(a.dims[-1], b.dims[-2] if b.ndim > 1 else b.dims[-1])
    call.mix(a.dims[-1:], (*a.dims[:-1], *b.dims[:-2], *(b.dims[-1:] if b.ndim > 1 else ())))
    rows = a.dims[-2:-1] if a.ndim > 1 else ()
    columns = b.dims[-1:] if b.ndim > 1 else ()
    leading = [Value(value.dims[:-2]) for value in (a, b)]
    count = max(value.ndim for value in leading)
    padded = [(1,) * (count - value.ndim) + value.shape for value in leading]
    shape = [one if other == 1 else other for one, other in zip(*padded)]
    return (*call.broadcast(leading, shape), *rows, *columns)
