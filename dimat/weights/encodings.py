"""Encodings: ways to send a snapshot's content in fewer bytes than in fp32.

An agent's own weights w stay unchanged. It publishes x̂ = decode(encode(w)), and all readers of a snapshot obtain x̂ to
the last bit, however it was sent: in full, or as a *form*, a safetensors file that decodes to x̂.

| encoding | form holds | x̂ is off by |
|---|---|---|
| fp32 | (none: the payload itself) | nothing |
| bf16, fp16 | numbers rounded to the nearest, half to even | 2⁻⁸, 2⁻¹¹ of a number at most (fp16 below 6e-5: 3e-8) |
| int8 | 8-bit integers, a scale for each 256 elements | half a scale: 1/254 of the largest of the 256 |
| int8, delta | the same of w - x̂′, x̂′ being the snapshot before | half a scale of that difference |

The rounding error of int8 is not lost: it is added to the next round's weights (`residual`), so that the mean of the
published weights over rounds approaches w; with deltas it is part of the next difference anyway. There is no delta in
bf16 or fp16: it would take twice int8's bytes to save an error that int8 corrects a round later.

Float32 tensors of at least `SMALLEST` elements are encoded. Stored unchanged are smaller ones (biases, statistics of
BatchNorm: they cost nothing, and a network is sensitive to them), all other types, statistics (`aux.…`), and tensors
with a number too large for the encoding.

A form's tensors are called "exact:NAME", "value:NAME" and "scale:NAME", so no two can collide; its metadata hold
encoding, kind ("whole" or "delta") and format.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from dimat.errors import DataError, unknown_name
from dimat.weights.header import NAMES, TensorInfo, compose_header, shown
from dimat.weights.int8 import LARGEST, LARGEST_SCALE, blocks_of, quantise, restore
from dimat.weights.tensors import EncodedTensors, Tensors, open_tensors

ENCODINGS = ("fp32", "bf16", "fp16", "int8")
SMALLEST = 1024
FORMAT = "1"
_STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
_LARGEST = {"int8": LARGEST, **{name: torch.finfo(_STORED[name]).max for name in ("bf16", "fp16")}}
_EXACT, _VALUE, _SCALE = "exact:", "value:", "scale:"


@dataclass(frozen=True, slots=True)
class Encoded:
    """`weights`: x̂, the readers' weights, on the CPU; tensors stored unchanged share memory with the input. `data`:
    the form, None for fp32, and if names take more space than numbers. `residual`: the rounding error of int8, to be
    passed in next time; empty otherwise."""

    weights: dict[str, Tensor]
    data: bytes | None
    residual: dict[str, Tensor]


def encode_weights(
    weights: Mapping[str, Tensor],
    encoding: str,
    *,
    after: Mapping[str, Tensor] | Path | None = None,
    residual: Mapping[str, Tensor] | None = None,
) -> Encoded:
    """Pass weights through an encoding. `after`: x̂ of the snapshot to which an int8 delta is taken (or its file);
    `residual`: that of the previous time, for int8 without delta. Neither is changed.

    Raises DataError naming a tensor that is not finite, and if `after` or `residual` do not fit.
    """
    if encoding not in ENCODINGS:
        raise DataError(unknown_name("encoding", encoding, ENCODINGS))
    if after is not None and encoding != "int8":
        raise DataError(f"there is no delta in {encoding}, only in int8")
    if after is not None and residual:
        raise DataError("a delta already includes the residual; pass `after` or `residual`, not both")
    decoded: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}
    left: dict[str, Tensor] = {}
    with ExitStack() as stack:
        held = stack.enter_context(open_tensors(after, "")) if isinstance(after, Path) else after
        for name, tensor in weights.items():
            own = tensor.detach().to("cpu")
            if own.dtype not in NAMES:
                raise DataError(f"tensor {shown(name)} is of type {own.dtype}, which no snapshot holds")
            largest = _largest(name, own)
            decoded[name] = own
            if encoding == "fp32":
                continue
            parts[_EXACT + name] = own
            if not _is_encoded(name, own) or largest > _LARGEST[encoding]:
                continue
            if encoding == "int8":
                quantised = quantise(
                    own,
                    residual=_like(own.shape, residual, name, "residual") if residual and name in residual else None,
                    after=None if held is None else _like(own.shape, held, name, "after"),
                )
                if quantised is None:
                    continue
                decoded[name] = quantised.decoded
                parts[_VALUE + name], parts[_SCALE + name] = quantised.values, quantised.scales
                if quantised.left is not None:
                    left[name] = quantised.left
            else:
                parts[_VALUE + name] = own.to(_STORED[encoding])
                decoded[name] = parts[_VALUE + name].to(torch.float32)
            del parts[_EXACT + name]
    if encoding == "fp32":
        return Encoded(decoded, None, {})
    form = EncodedTensors(parts, _metadata(encoding, delta=after is not None))
    return Encoded(decoded, b"".join(form.pieces()) if form.readable else None, left)


def decode_weights(form: Path | bytes, *, after: Mapping[str, Tensor] | Path | None = None) -> dict[str, Tensor]:
    """Return x̂ of a form, a file or its bytes. `after`: the snapshot to which it is a delta, if it is one.

    A form may come from an attacker. Raises DataError for anything malformed, and takes no more memory than four times
    its tensors, plus one tensor and the parsed header. The decoded content is not checked here: the reader must refuse
    numbers that are not finite, and names and shapes of another model, as in a full snapshot.
    """
    with ExitStack() as stack:
        file = stack.enter_context(open_tensors(form, "the form"))
        held = stack.enter_context(open_tensors(after, "")) if isinstance(after, Path) else after
        encoding = file.metadata.get("dimat.encoding", "none")
        kind = file.metadata.get("dimat.kind", "none")
        found = file.metadata.get("format", "none")
        if found != FORMAT or encoding not in _STORED or kind not in ("whole", "delta"):
            raise DataError(
                f"{file.where} is not a form that this dimat reads (format {found[:20]!r}, encoding {encoding[:20]!r}, "
                f"kind {kind[:20]!r})"
            )
        if kind == "delta" and (held is None or encoding != "int8"):
            raise DataError(f"{file.where} is a delta, and the snapshot to which it is taken is not here")
        decoder = _Decoder(file, _STORED[encoding], held if kind == "delta" else None)
        weights: dict[str, Tensor] = {}
        for part in file:
            name = part[len(_EXACT) :]
            if part.startswith(_SCALE):
                decoder.check_scale(name)
                continue
            if name in weights:
                raise DataError(f"{file.where}: tensor {shown(name)} is there twice")
            if part.startswith(_VALUE):
                weights[name] = decoder.decode(name)
            elif part.startswith(_EXACT):
                weights[name] = file[part]
            else:
                raise DataError(f"{file.where}: tensor {shown(part)} is part of nothing")
        return dict(sorted(weights.items()))


def encoded_bytes(weights_schema: Mapping[str, Tensor], encoding: str) -> int:
    """Return the largest size in bytes of a form, or for fp32 of the payload itself. Only shapes and types of the
    tensors matter. Any of them may be stored unchanged, so that a form's bound is about the payload's size."""
    exact = "" if encoding == "fp32" else _EXACT
    infos: dict[str, TensorInfo] = {}
    head = 0
    for name, tensor in weights_schema.items():
        infos[exact + name] = TensorInfo(tensor.dtype, tuple(tensor.shape))
        if encoding != "fp32" and _is_encoded(name, tensor):
            extra = {
                _VALUE + name: TensorInfo(_STORED[encoding], tuple(tensor.shape)),
                _SCALE + name: TensorInfo(torch.float32, (blocks_of(tensor.numel()),)),
            }
            # places in the file have more digits than here
            head += len(compose_header(extra, {})[0]) + 100
    data = sum(info.bytes for info in infos.values())
    return head + len(compose_header(infos, _metadata(encoding, delta=True))[0]) + data


class _Decoder:
    """Decodes the tensors of a form with one type of values; `after` if it is a delta."""

    def __init__(self, file: Tensors, stored: torch.dtype, after: Mapping[str, Tensor] | None) -> None:
        self._file = file
        self._stored = stored
        self._after = after

    def decode(self, name: str) -> Tensor:
        value = self._file.info(_VALUE + name)
        if value.dtype != self._stored:
            raise DataError(
                f"{self._file.where}: values of {shown(name)} are {value}, not of type {NAMES[self._stored]}"
            )
        if self._stored != torch.int8:
            return self._file[_VALUE + name].to(torch.float32)
        expected = TensorInfo(torch.float32, (blocks_of(value.elements),))
        if _SCALE + name not in self._file or self._file.info(_SCALE + name) != expected:
            raise DataError(f"{self._file.where}: values of {shown(name)} ({value}) need scales {expected}")
        after = None if self._after is None else _like(value.shape, self._after, name, "after")
        scales = self._file[_SCALE + name]
        # NaN is not in the range either
        if not bool(((scales >= 0) & (scales <= LARGEST_SCALE)).all()):
            raise DataError(f"{self._file.where}: scales of {shown(name)} are not between 0 and 2^120")
        return restore(self._file[_VALUE + name], scales, after)

    def check_scale(self, name: str) -> None:
        if self._stored != torch.int8 or _VALUE + name not in self._file:
            raise DataError(f"{self._file.where}: scales of {shown(name)} belong to no values")


def _is_encoded(name: str, tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.numel() >= SMALLEST and not name.startswith("aux.")


def _metadata(encoding: str, *, delta: bool) -> dict[str, str]:
    return {"dimat.encoding": encoding, "dimat.kind": "delta" if delta else "whole", "format": FORMAT}


def _like(shape: torch.Size | tuple[int, ...], others: Mapping[str, Tensor], name: str, what: str) -> Tensor:
    """Return a tensor of `others` in fp32 on the CPU; DataError unless it has this shape."""
    if isinstance(others, Tensors) and name in others:
        info = others.info(name)
    elif name in others:
        info = TensorInfo(others[name].dtype, tuple(others[name].shape))
    else:
        raise DataError(f"`{what}` has no tensor {shown(name)}")
    if info != TensorInfo(torch.float32, tuple(shape)):
        raise DataError(f"tensor {shown(name)} of `{what}` is {info}, not F32{[*shape]}")
    return others[name].detach().to("cpu").contiguous()


def _largest(name: str, tensor: Tensor) -> float:
    """Return the largest magnitude of a tensor, 0 if it has no floating-point numbers; DataError if not finite."""
    if tensor.numel() == 0 or not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        return 0.0
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.dtype.is_complex else tensor
    if real.dtype.itemsize == 1:  # float8
        real = real.to(torch.float32)
    low, high = torch.aminmax(real)
    largest = max(-float(low), float(high))
    if not isfinite(largest):
        raise DataError(f"tensor {shown(name)} holds numbers that are not finite; such weights are never published")
    return largest
