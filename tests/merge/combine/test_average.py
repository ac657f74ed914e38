"""The weighted average: exactness rules, dtypes, laziness."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dimat.merge.combine.average import average
from tests.merge.methods import Counted


def state(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(4, 3, generator=g) * 100,
        "bias": torch.randn(1, generator=g),
        "scalar": torch.randn((), generator=g),
        "double": torch.randn(2, generator=g, dtype=torch.float64),
        "count": torch.randint(0, 100, (), generator=g),
        "mask": torch.rand(3, generator=g) > 0.5,
        "empty": torch.zeros(0, 3),
    }


@settings(max_examples=30, deadline=None)
@given(raw=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_average_equals_the_weighted_sum(raw: list[float], seed: int) -> None:
    """Reference: Σ w_k θ_k in float64; integers and booleans are own's."""
    weights = [w / (sum(raw) + 1) for w in [1.0, *raw]]
    states = [state(seed + k) for k in range(len(weights))]
    merged = dict(average(states[0], states[1:], weights))
    for name, tensor in states[0].items():
        if tensor.is_floating_point():
            expected = sum((w * s[name].double() for w, s in zip(weights, states)), torch.zeros_like(tensor).double())
            torch.testing.assert_close(merged[name], expected.to(tensor.dtype), rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(merged[name], tensor)
        assert merged[name].dtype == tensor.dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3], [0.0, 1.0]])
def test_equal_copies_return_own_bit_for_bit(dtype: torch.dtype, weights: list[float]) -> None:
    """Zero deltas add nothing, whatever the weights round to."""
    own = {"w": torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype) * 37}
    merged = dict(average(own, [own] * (len(weights) - 1), weights))
    assert torch.equal(merged["w"], own["w"])
    assert merged["w"].data_ptr() != own["w"].data_ptr()


def test_weight_one_on_self_is_bit_exact_even_for_negative_zero() -> None:
    """Bits are compared, so that −0.0 and 0.0 differ."""
    own = {"w": torch.tensor([-0.0, 0.0, 1e-45, 3.4e38])}
    merged = dict(average(own, [{"w": torch.ones(4)}], [1.0, 0.0]))
    assert torch.equal(merged["w"].view(torch.int32), own["w"].view(torch.int32))


def test_weight_one_on_a_peer_returns_the_peer() -> None:
    """θ_own + (θ_peer − θ_own) must not lose a small peer to a large own: the sum is in float64."""
    merged = dict(average({"w": torch.tensor([1e8, -1e8])}, [{"w": torch.tensor([1.0, 1e-3])}], [0.0, 1.0]))
    torch.testing.assert_close(merged["w"], torch.tensor([1.0, 1e-3]), rtol=1e-4, atol=0)


def test_half_types_accumulate_in_float32() -> None:
    """Ten bfloat16 copies 1/256 apart: a bfloat16 running sum would drop every step."""
    own = {"w": torch.ones(1, dtype=torch.bfloat16)}
    peers = [{"w": torch.tensor([1 + 1 / 128], dtype=torch.bfloat16)} for _ in range(9)]
    merged = average(own, peers, [0.1] * 10)
    assert merged["w"].item() == torch.tensor(1 + 0.9 / 128).to(torch.bfloat16).item()


def test_peers_are_read_once_tensor_by_tensor() -> None:
    """Peak memory is one tensor per peer: each that is averaged is asked for once, in the same order."""
    own, peer = state(0), Counted(state(1))
    dict(average(own, [peer], [0.5, 0.5]))
    assert peer.reads == [name for name, tensor in own.items() if tensor.is_floating_point() and tensor.numel()]
