"""Random draws: entries are independent and identically distributed, in any order.

The axes of a draw are unconstrained at first: if it is added to or multiplied with a tensor, its units move with that
tensor's, wherever the same draw is used.
"""

from __future__ import annotations

from dimat.symmetry.rules.call import Call, Result, Value, rule


@rule(
    *(f"aten.{name}" for name in ("rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "uniform")),
    *(f"aten.{name}" for name in ("exponential", "cauchy", "geometric", "log_normal", "random")),
)
def draw(call: Call) -> Result:
    """All entries have one distribution, whatever the tensor held before."""
    return Value(tuple(call.domain.fresh(size) for size in call.shape()))


@rule("aten.bernoulli", "aten.normal", "aten.poisson", "aten.binomial", "aten._standard_gamma")
@rule("aten.normal_functional", "aten.rrelu_with_noise", "aten.rrelu_with_noise_functional")
def draw_by_entry(call: Call) -> Result:
    """Each entry has a distribution of its own, which the arguments give entry by entry."""
    made = Value(call.broadcast(call.tensors(), call.shape()))
    return made if call.output_count == 1 else [made for _ in range(call.output_count)]


@rule("aten.native_dropout", "aten._fused_dropout")
def dropout_with_mask(call: Call) -> Result:
    """The result and the mask have the axes of the input."""
    x = call.tensors()[0]
    return [x, x]


@rule("aten.multinomial", "aten._sample_dirichlet")
def sample(call: Call) -> Result:
    """Entries of the last axis are named by number, or summed to one."""
    x = call.value("self")
    call.freeze(x.dims[-1:], "the index of an entry is used")
    return Value((*x.dims[:-1], call.fixed(call.shape()[-1], "the index of an entry is used")))


@rule("aten.randperm")
def order(call: Call) -> Result:
    """A random order of places; what is taken by it is looked up by index."""
    return Value(tuple(call.fixed(size, "random order") for size in call.shape()))
