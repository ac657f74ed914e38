"""Tensors made from scratch, and operations that return a number or check something."""

from __future__ import annotations

from dimat.symmetry.rules.call import Call, Result, Value, rule


@rule(
    *(f"aten.{name}" for name in ("zeros", "ones", "full", "scalar_tensor", "new_zeros", "new_ones", "new_full")),
    *(f"aten.{name}" for name in ("zeros_like", "ones_like", "full_like")),
    *(f"aten.{name}" for name in ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")),
    "aten.empty_permuted",
)
def constant(call: Call) -> Result:
    """All entries are equal, or not written yet, so any permutation of them does nothing."""
    return Value(tuple(call.domain.fresh(size) for size in call.shape()))


@rule(
    *(f"aten.{name}" for name in ("arange", "linspace", "logspace", "eye", "tril_indices", "triu_indices")),
    *(f"aten.{name}" for name in ("hann_window", "hamming_window", "bartlett_window", "blackman_window")),
    *(f"aten.{name}" for name in ("kaiser_window", "fft_fftfreq", "fft_rfftfreq", "vander", "cartesian_prod")),
)
def pattern(call: Call) -> Result:
    """Entries differ by place."""
    return Value(tuple(call.fixed(size, "fixed pattern") for size in call.shape()))


@rule(
    *(f"aten.{name}" for name in ("sym_size", "sym_numel", "sym_stride", "sym_storage_offset", "item")),
    *(f"aten.{name}" for name in ("_local_scalar_dense", "_assert_scalar", "_assert_async", "_assert_tensor_metadata")),
    "aten.sym_constrain_range",
    "aten.sym_constrain_range_for_size",
    "aten._functional_assert_async",
)
def no_tensor(call: Call) -> Result:
    """Sizes and single numbers do not depend on the order of units."""
    return None
