"""Scaled dot-product attention: heads stay apart, and a head's units go together."""

from __future__ import annotations

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


def _repeated(call: Call, x: Value, heads: int) -> Value:
    """Return `x` with each of its heads repeated, as many as the query has."""
    given = x.shape[-3]
    if heads % given:
        raise NoRule(f"{heads} heads of the query for {given} of the key or value")
    axis: Layout = call.domain.merge([x.dims[-3], call.domain.fresh(heads // given)])
    return Value((*x.dims[:-3], axis, *x.dims[-2:]))
