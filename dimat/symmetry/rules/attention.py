"""Scaled dot-product attention, without permutations of its own for each head (those need wreath groups)."""

from __future__ import annotations

from dimat.symmetry.rules.call import Call, NoRule, Result, Value, rule


@rule("aten.scaled_dot_product_attention")
def attention(call: Call) -> Result:
    """softmax(q kᵀ + mask) v with q (…, L, E), k (…, S, E), v (…, S, V): E, S and leading axes are shared."""
    q, k, v = (call.value(name) for name in ("query", "key", "value"))
    mask = call.optional("attn_mask")
    if call.constant("enable_gqa", False):
        raise NoRule("grouped-query attention")
    call.domain.unify(q.dims[-1], k.dims[-1])
    call.domain.unify(k.dims[-2], v.dims[-2])
    if call.constant("is_causal", False):
        call.freeze([q.dims[-2], k.dims[-2]], "causal attention")
    shape = call.shape()[:-2]
    leading = call.broadcast([Value(value.dims[:-2]) for value in (q, k, v)], shape)
    if mask is not None:
        scores = Value((*leading, q.dims[-2], k.dims[-2]))
        call.broadcast([scores, mask], scores.shape)
    return Value((*leading, q.dims[-2], v.dims[-1]))
