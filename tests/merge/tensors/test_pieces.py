"""Going through tensors in pieces: nothing depends on how they are cut, or on how many threads work on them.

Reference: the same formulas on whole tensors, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dimat.merge.registry import combine_registry
from dimat.merge.tensors.pieces import PIECE, Pieces

LARGE = (301, 2003)  # 18 pieces and a rest


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def drawn(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=g).to(dtype) for _ in range(count)]


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(0, 9), max_size=3), size=st.integers(1, 50), based=st.booleans())
def test_pieces_put_together_are_the_tensors(shape: list[int], size: int, based: bool) -> None:
    own, peer, base = drawn(tuple(shape), 3)
    pieces = Pieces([own, peer], own, base if based else None, size=size)
    expected = [tensor.double() - (base.double() if based else 0) for tensor in (own, peer)]
    if not own.numel():
        return
    for k, tensor in enumerate(expected):
        assert torch.equal(torch.cat([*pieces.of(k)]), tensor.flatten())
        assert torch.equal(torch.cat([values[k] for values in pieces]), tensor.flatten())
    gram = torch.stack([tensor.flatten() for tensor in expected])
    torch.testing.assert_close(pieces.products(), gram @ gram.mT)
    back = pieces.merged(lambda values: values[1])
    torch.testing.assert_close(back, peer, rtol=0, atol=1e-6 if based else 0)


def test_complex_half_and_strided_tensors_keep_type_and_shape() -> None:
    """Complex numbers are two reals each; the result is dense and of own's type."""
    for own in (torch.randn(4, 3, dtype=torch.complex64), torch.randn(3, 4).bfloat16().mT, torch.tensor(2.0).half()):
        merged = Pieces([own], own).merged(lambda values: values[0])
        assert merged.dtype == own.dtype
        assert torch.equal(merged, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "method",
    ["average", "ties", "breadcrumbs", "dare-ties", "della", "sce", "model-stock", "coordinate-median", "slerp"],
)
def test_threads_change_no_bit(method: str, dtype: torch.dtype) -> None:
    """One thread or three: pieces are cut alike."""
    base, own, *others = ({"w": tensor} for tensor in drawn(LARGE, 4, dtype))
    peers = others[:1] if method == "slerp" else others
    mixing = [1 / (len(peers) + 1)] * (len(peers) + 1)
    results: list[Tensor] = []
    for count in (1, 3):
        generator = torch.Generator().manual_seed(0)
        with threads(count):
            merged = combine_registry.call(method, {}, own, peers, mixing, base=base, generator=generator)["w"]
        results.append(merged)
    assert own["w"].numel() > 16 * PIECE
    assert torch.equal(*results)
    assert results[0].isfinite().all()


def test_an_error_in_a_thread_is_raised() -> None:
    """And not lost, with half a tensor returned."""
    (own,) = drawn(LARGE, 1)

    def fail(values: list[Tensor]) -> Tensor:
        if len(values[0]) < PIECE:
            raise ValueError("the last piece")
        return values[0]

    with threads(2), pytest.raises(ValueError, match="last piece"):
        Pieces([own], own).merged(fail)
