"""Weights to encode, and ways to compare them by bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int64,
    torch.int8,
    torch.uint16,
    torch.bool,
]

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["aux.fisher.w", "exact:a", "value:a", "scale:a", "scale:exact:a", "a"]
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """A tensor of any type, 0-d, empty, small, or of a few blocks, of ordinary, tiny or huge numbers, or strided."""
    shape = draw(st.sampled_from([(), (0,), (3, 0), (5,), (31, 33), (1024,), (1281,), (2, 700), (40, 64), (3, 4, 129)]))
    dtype = draw(st.sampled_from([torch.float32] * 5 + DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    size = draw(st.sampled_from([1.0, 1e-3, 1e-38, 1e-42, 1e4, 1e5, 1e37, 0.0]))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    values = values * torch.rand(shape, generator=generator, dtype=torch.float64) ** draw(st.integers(0, 9))
    if not dtype.is_floating_point:
        return (values * 20).to(torch.int64).abs().to(dtype)
    if dtype in (torch.float32, torch.float64):
        values *= size
    made = values.to(dtype)
    return made.T if len(shape) == 2 and draw(st.booleans()) else made


weights = st.dictionaries(names, tensors(), max_size=5)


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    """All that a tensor is: -0.0 is not 0.0 here."""
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Say whether two sets of weights are equal to the last bit."""
    return {n: bits(t) for n, t in left.items()} == {n: bits(t) for n, t in right.items()}


def network(seed: int = 0) -> dict[str, Tensor]:
    """The weights of a small network."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "first.weight": torch.randn(96, 61, generator=generator) / 10,
        "first.bias": torch.randn(96, generator=generator),
        "norm.running_var": torch.rand(96, generator=generator),
        "norm.num_batches_tracked": torch.tensor(7),
        "last.weight": torch.randn(40, 96, generator=generator),
        "aux.fisher.first.weight": torch.rand(96, 61, generator=generator),
    }
