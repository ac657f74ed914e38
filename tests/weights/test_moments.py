"""Moments on their way. References: the bounds that the module states, exact arithmetic, and damaged tensors."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dimat.errors import DataError
from dimat.weights.int8 import BLOCK
from dimat.weights.moments import (
    MOMENT,
    SCALE,
    SMALLEST_SHARE,
    decode_moment,
    encode_moments,
    from_codes,
    is_squared,
    to_codes,
)

STEPS = 2 ** (1 / 16) - 1  # half a step of the codes, as a share of a number


def drawn(seed: int, elements: int, spread: float) -> Tensor:
    """Numbers of both signs over many powers of ten, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(elements, generator=generator) * torch.pow(10.0, spread * torch.randn(1, generator=generator))
    values *= torch.pow(10.0, spread * torch.randn(elements, generator=generator))
    values[torch.rand(elements, generator=generator) < 0.1] = 0
    return values


@given(st.integers(0, 2**31), st.integers(1, 3 * BLOCK + 5), st.floats(0, 4))
def test_codes_are_off_by_a_share_of_each_number(seed: int, elements: int, spread: float) -> None:
    """4.4 % at most down to the smallest share of a block's largest; below it there is that share, and 0 is 0."""
    values = drawn(seed, elements, spread)
    codes, scales = to_codes(values)
    found = from_codes(codes, scales)
    assert codes.dtype == torch.int8
    assert int(codes.abs().max()) <= 127
    for start in range(0, elements, BLOCK):
        own, back = values[start : start + BLOCK].double(), found[start : start + BLOCK].double()
        largest = own.abs().max()
        fine = own.abs() >= largest * SMALLEST_SHARE
        assert bool(((back - own).abs()[fine] <= (STEPS + 1e-5) * own.abs()[fine]).all())
        assert bool((back.abs()[~fine] <= largest * SMALLEST_SHARE * (1 + 1e-5)).all())
        assert torch.equal(back.sign(), own.sign()) or float(largest) < 1e-30
        assert float(back.abs().max()) == float(largest)


@given(st.integers(0, 2**31), st.sampled_from(["int8", "bf16", "fp32"]), st.floats(0, 3))
def test_averages_of_squares_stay_what_they_are(seed: int, encoding: str, spread: float) -> None:
    """Never negative, and 0 only where they were: Adam divides by their roots. In fp32 off by a few roundings."""
    values = drawn(seed, 1500, spread).square().clamp_(1e-30, 1e30)
    values[::7] = 0
    tensors = encode_moments({"exp_avg_sq.w": values}, encoding)
    found = decode_moment(tensors, "exp_avg_sq.w")
    assert bool((found >= 0).all())
    assert torch.equal(found == 0, values == 0)
    if encoding == "fp32":
        torch.testing.assert_close(found, values, rtol=1e-6, atol=0)
    elif encoding == "bf16":
        torch.testing.assert_close(found, values, rtol=2.0**-7, atol=0)


@pytest.mark.parametrize("encoding", ["int8", "bf16", "fp32"])
def test_types_names_and_bytes(encoding: str) -> None:
    """Codes with a scale for each block; what is small travels in fp32, counts in fp64, in every encoding."""
    moments = {
        "exp_avg.w": torch.randn(40, 50, generator=torch.Generator().manual_seed(0)),
        "exp_avg.b": torch.ones(40),
        "step.w": torch.tensor(7.0),
        "1:step.w": torch.tensor(9),
    }
    tensors = encode_moments(moments, encoding)
    types = {"int8": torch.int8, "bf16": torch.bfloat16, "fp32": torch.float32}
    assert tensors[f"{MOMENT}exp_avg.w"].dtype == types[encoding]
    assert tensors[f"{MOMENT}exp_avg.b"].dtype == torch.float32
    assert tensors[f"{MOMENT}1:step.w"].dtype == torch.float64
    assert (f"{SCALE}exp_avg.w" in tensors) == (encoding == "int8")
    if encoding == "int8":
        assert tensors[f"{SCALE}exp_avg.w"].shape == (8,)  # 2,000 elements, blocks of 256
    for name, moment in moments.items():
        found = decode_moment(tensors, name)
        assert found.shape == moment.shape
        torch.testing.assert_close(found.float(), moment.float(), rtol=0.05, atol=1e-4)


def test_equal_moments_give_equal_bits() -> None:
    """A resumed agent publishes what it published before: nothing is carried over from one time to the next."""
    values = drawn(3, 5000, 2)
    first, again = (encode_moments({"exp_avg.w": values.clone()}, "int8") for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_entries_that_are_known_not_to_be_negative() -> None:
    """Of torch's optimizers, and of an optimizer inside another one."""
    squared = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta", "exp_inf", "1:exp_avg_sq", "variance")
    assert all(is_squared(f"{entry}.layer.weight") for entry in squared)
    assert not any(is_squared(f"{entry}.sum") for entry in ("exp_avg", "momentum_buffer", "grad_avg", "step"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{MOMENT}exp_avg_sq.w": torch.full((40, 50), -1, dtype=torch.int8)}, "holds invalid codes"),
        ({f"{MOMENT}exp_avg.w": torch.full((40, 50), -128, dtype=torch.int8)}, "holds invalid codes"),
        ({f"{MOMENT}exp_avg.w": torch.zeros(40, 50, dtype=torch.int16)}, "of type torch.int16"),
        ({f"{MOMENT}exp_avg.w": torch.zeros(40, 50, dtype=torch.float64)}, "of type torch.float64"),
        ({f"{SCALE}exp_avg.w": torch.full((8,), -1.0)}, "not between 0 and 2^126"),
        ({f"{SCALE}exp_avg.w": torch.full((8,), float("nan"))}, "not between 0 and 2^126"),
        ({f"{SCALE}exp_avg.w": torch.full((8,), float("inf"))}, "not between 0 and 2^126"),
        ({f"{SCALE}exp_avg.w": torch.zeros(7)}, "needs 8 scales in float32"),
        ({f"{SCALE}exp_avg.w": torch.zeros(8, dtype=torch.float64)}, "needs 8 scales in float32"),
        ({f"{SCALE}exp_avg.w": None}, "needs 8 scales in float32"),
        ({f"{SCALE}exp_avg_sq.w": torch.full((8,), 2.0**100)}, "too large to be squared"),
        ({f"{MOMENT}exp_avg_sq.b": torch.full((40,), -1.0)}, "negative or not finite"),
        ({f"{MOMENT}exp_avg.b": torch.full((40,), float("nan"))}, "negative or not finite"),
        ({f"{MOMENT}step.w": torch.tensor(-1.0, dtype=torch.float64)}, "negative or not finite"),
        ({f"{MOMENT}step.w": torch.tensor(1e300, dtype=torch.float64)}, "not a count of steps"),
        ({f"{MOMENT}step.w": torch.zeros(3, dtype=torch.float64)}, "not a count of steps"),
        ({f"{MOMENT}step.w": torch.tensor(3)}, "of type torch.int64"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Tensor | None], said: str) -> None:
    """Damaged or hostile tensors, one fault each; the error is one line."""
    whole = {f"{entry}.{name}": torch.ones(*shape) for entry in ("exp_avg", "exp_avg_sq") for name, shape in SHAPES}
    tensors = encode_moments({**whole, "step.w": torch.tensor(3.0)}, "int8")
    damaged = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
    with pytest.raises(DataError, match=re.escape(said)) as caught:
        _ = [decode_moment(damaged, name) for name in (*whole, "step.w")]
    assert "\n" not in str(caught.value)


SHAPES = (("w", (40, 50)), ("b", (40,)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_own_moments_that_are_none_are_not_sent(value: float) -> None:
    with pytest.raises(DataError, match=r"the optimizer's 'exp_avg_sq\.w' holds numbers that are"):
        encode_moments({"exp_avg_sq.w": torch.full((3,), value)}, "int8")


def test_moments_too_large_for_codes_travel_as_they_are() -> None:
    """Beyond 2^126 nothing is quantised, as with weights."""
    tensors = encode_moments({"exp_avg.w": torch.full((2000,), 1e38)}, "int8")
    assert tensors[f"{MOMENT}exp_avg.w"].dtype == torch.float32
    with pytest.raises(DataError, match="int8, bf16 or fp32"):
        encode_moments({}, "fp16")
