"""Complex numbers and Fourier transforms: pairs of parts, and axes of fixed order."""

from __future__ import annotations

import re

from dimat.symmetry.rules.call import Call, NoRule, Result, Value, op_name, rule

_FOURIER = "axis of a Fourier transform"


@rule("aten.view_as_complex", "aten._view_as_complex")
def as_complex(call: Call) -> Result:
    """The last axis holds the two parts of a number."""
    x = call.value("self")
    call.freeze(x.dims[-1:], "real and imaginary part")
    return Value(x.dims[:-1])


@rule("aten.view_as_real", "aten._view_as_real")
def as_real(call: Call) -> Result:
    """A new last axis holds the two parts of a number."""
    return Value((*call.value("self").dims, call.fixed(2, "real and imaginary part")))


@rule("aten.conj", "aten._conj", "aten._conj_physical", "aten.conj_physical", "aten._neg_view", "aten.resolve_neg")
def conjugate(call: Call) -> Result:
    """Each entry alone."""
    return call.value("self")


@rule("aten.resolve_conj")
def resolve_conj(call: Call) -> Result:
    """Each entry alone. Of real numbers it is what remains of a way out of torch, as to NumPy."""
    if not call.node.meta["val"].is_complex():
        raise NoRule("real numbers that leave torch")
    return call.value("self")


@rule(*(f"aten.fft_{kind}{n}" for n in ("", "2", "n") for kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")))
@rule("aten.fft_fftshift", "aten.fft_ifftshift", "aten._fft_r2c", "aten._fft_c2r", "aten._fft_c2c")
def fourier(call: Call) -> Result:
    """Transformed axes are fixed, the others pass."""
    x, shape = call.value("self"), call.shape()
    sizes, given = call.constant("s"), call.constant("dim")
    if given is None and isinstance(sizes, list) and re.search(r"n\.", op_name(call.node.target)):
        axes = list(range(x.ndim - len(sizes), x.ndim))
    else:
        axes = call.dims("dim", x.ndim)
    call.freeze([x.dims[d] for d in axes], _FOURIER)
    return Value(tuple(call.fixed(shape[d], _FOURIER) if d in axes else x.dims[d] for d in range(x.ndim)))


@rule("aten.stft", "aten.istft")
def short_time(call: Call) -> Result:
    """A batch axis passes; time and frequency are fixed."""
    x, shape = call.value("self"), call.shape()
    kept = x.ndim - (1 if "istft" not in op_name(call.node.target) else 2)
    call.freeze([layout for value in call.tensors()[1:] for layout in value.dims], _FOURIER)
    call.freeze(x.dims[kept:], _FOURIER)
    return Value((*x.dims[:kept], *(call.fixed(size, _FOURIER) for size in shape[kept:])))
