"""Moments of optimizers in transfer: in 8-bit logarithmic codes, in bf16 or in fp32.

A moment is an entry of an optimizer's state that has its parameter's shape, named `<entry>.<parameter>`
("exp_avg.conv1.weight"). It is sent as a tensor `moment.<entry>.<parameter>`, int8 codes with their scales as
`moment-scale.<entry>.<parameter>` (float32, one for each `int8.BLOCK` elements). The type identifies the encoding.

Averages of squares (`is_squared`) are sent as their roots, and squared again by the reader: so they are never negative,
and their range in powers of ten is halved. The value of code c is sign(c) · scale · 2^((|c| − 127) / 8), that of 0 is
0; scale is the block's largest magnitude. So each element is off by at most 2^(1/16) − 1 = 4.4 % of itself, down to
`SMALLEST_SHARE` of the block's largest, to which smaller elements other than 0 are raised. Uniform steps (`int8`)
suffice for weights, but Adam divides by the root of a second moment: a small one that is read as 0 makes the step large
there, and as it decays over a thousand steps, each merge would add to that. Moments of fewer than `encodings.SMALLEST`
elements, such as those of biases, are sent in fp32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dimat.errors import DataError
from dimat.weights.encodings import SMALLEST
from dimat.weights.header import shown
from dimat.weights.int8 import LARGEST, blocks_of, pieces

MOMENT, SCALE = "moment.", "moment-scale."
"""Prefixes of the names of tensors."""
STEP = "step"
"""The entry that counts steps, a number for each parameter; it is sent as one float64, in every encoding."""
LEVELS, PER_OCTAVE = 127, 8
SMALLEST_SHARE = 2.0 ** (-(LEVELS - 1) / PER_OCTAVE)
"""The smallest magnitude that a code has, as a share of its block's largest: 1.8e-5."""
SIGNED = frozenset(("exp_avg", "momentum_buffer", "grad_avg", "prev", "ax", "exp_avg_diff"))
SQUARED = re.compile(r"(max_)?(exp_avg_sqs?|exp_avg_square|square_avg|second_moment|variance|sum|acc_delta|exp_inf)")
"""Entries known to be signed, and those that are averages or sums of squares, or of magnitudes."""
LARGEST_STEP = 2.0**53
_FAMILY = re.compile(r"\d+:")
_POWERS = torch.tensor([2.0 ** (code / PER_OCTAVE) for code in range(1 - LEVELS, 1)], dtype=torch.float64)
_TABLE = torch.cat([-_POWERS.flip(0), torch.zeros(1, dtype=torch.float64), _POWERS]).float()  # code + 127 → value


def entry_of(name: str) -> str:
    """Return the entry of a moment's name, without the number that it has if its optimizer is inside another."""
    return _FAMILY.sub("", name.partition(".")[0])


def is_squared(name: str) -> bool:
    """Tell whether a moment is known not to be negative, by its entry's name; it is sent as its root."""
    return SQUARED.fullmatch(entry_of(name)) is not None


def is_known(name: str) -> bool:
    """Tell whether it is known if a moment may be negative."""
    entry = entry_of(name)
    return entry == STEP or entry in SIGNED or SQUARED.fullmatch(entry) is not None


def encode_moments(moments: Mapping[str, Tensor], encoding: str) -> dict[str, Tensor]:
    """Return the tensors in which moments are sent. `encoding`: "int8", "bf16" or "fp32".

    Raises DataError for an unknown encoding, and for moments that are not finite, or negative where they may not be.
    """
    if encoding not in ("int8", "bf16", "fp32"):
        raise DataError(f"moments are encoded in int8, bf16 or fp32, not in {encoding!r}")
    found: dict[str, Tensor] = {}
    for name, moment in moments.items():
        if entry_of(name) == STEP:
            found[MOMENT + name] = moment.detach().to("cpu", torch.float64).reshape(())
            continue
        values = moment.detach().to("cpu", torch.float32).contiguous()
        largest = float(values.abs().max()) if values.numel() else 0.0
        squared = is_squared(name)
        if not largest < float("inf") or (squared and bool((values < 0).any())):
            fault = "not finite" if not largest < float("inf") else "below 0, and of squares"
            raise DataError(f"the optimizer's {shown(name)} holds numbers that are {fault}; it cannot be published")
        values = values.sqrt() if squared else values
        if encoding == "fp32" or values.numel() < SMALLEST or (not squared and largest > LARGEST):
            found[MOMENT + name] = values
        elif encoding == "bf16":
            found[MOMENT + name] = values.to(torch.bfloat16)
        else:
            found[MOMENT + name], found[SCALE + name] = to_codes(values)
    return found


def decode_moment(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a moment, in fp32 on the CPU (a count of steps in fp64), from the tensors in which it was sent.

    They may come from an attacker: DataError for invalid types, scales, codes and values. The shape is the one that was
    sent, and the reader must check it.
    """
    values = tensors[MOMENT + name]
    counts, squared = entry_of(name) == STEP, is_squared(name)
    types = (torch.float64,) if counts else (torch.int8, torch.bfloat16, torch.float32)
    if values.dtype not in types:
        raise DataError(f"{shown(name)} is of type {values.dtype}, in which no moment is sent")
    if values.dtype == torch.int8:
        scales = tensors.get(SCALE + name)
        expected = blocks_of(values.numel())
        if scales is None or scales.dtype != torch.float32 or tuple(scales.shape) != (expected,):
            raise DataError(f"{shown(name)} needs {expected} scales in float32")
        # NaN is not in the range either
        if not bool(((scales >= 0) & (scales <= LARGEST)).all()):
            raise DataError(f"scales of {shown(name)} are not between 0 and 2^126")
        if bool((values < (0 if squared else -LEVELS)).any()):
            raise DataError(f"{shown(name)} holds invalid codes")
        values = from_codes(values, scales)
    elif not bool(values.isfinite().all()) or ((squared or counts) and bool((values < 0).any())):
        raise DataError(f"{shown(name)} holds values that are negative or not finite")
    if counts:
        if values.numel() != 1 or float(values) > LARGEST_STEP:
            raise DataError(f"{shown(name)} is not a count of steps")
        return values.reshape(())
    decoded = values.float()
    if not squared:
        return decoded
    decoded = decoded * decoded
    if not bool(decoded.isfinite().all()):
        raise DataError(f"{shown(name)} is too large to be squared")
    return decoded


def to_codes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes of finite float32 values, of their shape, and the scale of each block."""
    flat = values.reshape(-1)
    codes = torch.empty(len(flat), dtype=torch.int8)
    scales = torch.empty(blocks_of(len(flat)))
    for elements, blocks, width in pieces(len(flat)):
        rows = flat[elements].view(-1, width)
        magnitudes = rows.abs()
        largest = scales[blocks] = magnitudes.amax(1)
        # 0 / 0 is a block of zeros
        levels = torch.div(magnitudes, torch.where(largest > 0, largest, 1.0)[:, None]).log2_()
        levels.mul_(PER_OCTAVE).round_().add_(LEVELS).clamp_(1, LEVELS)
        codes[elements] = (levels * rows.sign()).to(torch.int8).view(-1)
    return codes.view(values.shape), scales


def from_codes(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the values of codes from −127 to 127 and their scales."""
    flat = codes.reshape(-1)
    values = torch.empty(len(flat))
    for elements, blocks, width in pieces(len(flat)):
        torch.index_select(_TABLE, 0, flat[elements].int().add_(LEVELS), out=values[elements])
        values[elements].view(-1, width).mul_(scales[blocks][:, None])
    return values.view(codes.shape)
