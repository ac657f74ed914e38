"""Scaled dot-product attention: heads stay apart, and a head's units go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from dimat.symmetry.atoms import Layout
from dimat.symmetry.rules.call import Call, NoRule, Result, Value, rule


@rule("aten.scaled_dot_product_attention")
def attention(call: Call) -> Result:
    """softmax(q kᵀ + mask) v with q (…, H, L, E), k (…, K, S, E), v (…, K, S, V): E, S and leading axes are shared.

    With `enable_gqa`, each of the K heads of k and v serves H / K consecutive heads of q.
    """
    q, k, v = (call.value(name) for name in ("query", "key", "value"))
    mask = call.optional("attn_mask")
    if call.constant("enable_gqa", False) and q.ndim > 2:
        k, v = (_repeated(call, value, q.shape[-3]) for value in (k, v))
    call.domain.unify(q.dims[-1], k.dims[-1])
    call.domain.unify(k.dims[-2], v.dims[-2])
    if call.constant("is_causal", False):
        call.freeze([q.dims[-2], k.dims[-2]], "causal attention")
    shape = call.shape()[:-2]
    leading = call.broadcast([Value(value.dims[:-2]) for value in (q, k, v)], shape)
    if mask is not None:
        scores = Value((*leading, q.dims[-2], k.dims[-2]))
        call.broadcast([scores, mask], scores.shape)
    call.mix(q.dims[-1:], (*leading, q.dims[-2], k.dims[-2]))
    call.mix(k.dims[-2:-1], (*leading, q.dims[-2], v.dims[-1]))
    return Value((*leading, q.dims[-2], v.dims[-1]))


@rule("higher_order.flex_attention")
def flex_attention(call: Call) -> Result:
    """The same with scores that a function changes, by the positions of query and key, and a mask in blocks of
    positions.

    Arguments: query, key, value, that function, the parts of the mask (its function last), the scale, options, and
    tensors that the two functions read. Heads are frozen if a function, or the mask, distinguishes them.
    """
    q, k, v = (call.value(str(number)) for number in range(3))
    mask: Sequence[Any] = call.arguments["4"]
    by_head = _reads(call, call.arguments["3"], 2) or _reads(call, mask[-1], 1) or any(_has_heads(x) for x in mask)
    k, v = (_repeated(call, value, q.shape[-3]) for value in (k, v))
    call.domain.unify(q.dims[-1], k.dims[-1])
    call.domain.unify(k.dims[-2], v.dims[-2])
    call.freeze([q.dims[-2], k.dims[-2]], "places in attention")
    for number in ("7", "8"):
        for layout in (layout for x in call.tensors(number) for layout in x.dims):
            call.domain.freeze(layout, call.why("looked into by a function of scores"))
    leading = call.broadcast([Value(value.dims[:-2]) for value in (q, k, v)], q.shape[:-2])
    if by_head:
        call.domain.freeze(leading[-1], call.why("heads are told apart by number"))
    call.mix(q.dims[-1:], (*leading, q.dims[-2], k.dims[-2]))
    call.mix(k.dims[-2:-1], (*leading, q.dims[-2], v.dims[-1]))
    sums = Value((*leading, q.dims[-2]))
    return [Value((*leading, q.dims[-2], v.dims[-1])), *(sums for _ in range(1, call.output_count))]


def _reads(call: Call, function: Any, position: int) -> bool:
    """Tell whether a function among the arguments uses one of its arguments, or cannot be inspected."""
    graph = getattr(call.node.graph.owning_module, str(function.target), None) if _is_node(function) else None
    if not isinstance(graph, fx.GraphModule):
        return True
    return bool([node for node in graph.graph.nodes if node.op == "placeholder"][position].users)


def _has_heads(given: Any) -> bool:
    """Tell whether a tensor of a block mask differs between heads."""
    shape = getattr(given.meta.get("val"), "shape", ()) if _is_node(given) else ()
    return len(shape) > 1 and shape[1] != 1


def _is_node(given: Any) -> bool:
    return isinstance(given, fx.Node)


def _repeated(call: Call, x: Value, heads: int) -> Value:
    """Return `x` with each of its heads repeated, as many as the query has."""
    given = x.shape[-3]
    if heads % given:
        raise NoRule(f"{heads} heads of the query for {given} of the key or value")
    axis: Layout = call.domain.merge([x.dims[-3], call.domain.fresh(heads // given)])
    return Value((*x.dims[:-3], axis, *x.dims[-2:]))
