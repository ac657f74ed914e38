"""The screen: checks a peer's weights before any of them is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor

from dimat.errors import MergeError, PeerError, nearest
from dimat.merge.growth import Reference
from dimat.merge.natures import Nature, Natures
from dimat.merge.stages import Weights

MAX_NORM_RATIO = 10.0
UNKNOWN = Natures({})
"""Natures of a model of which nothing is known: all entries are parameters."""


def screen(
    own: Weights,
    peer: Weights,
    name: str,
    own_norm: float,
    natures: Natures = UNKNOWN,
    reference: Reference | None = None,
    *,
    max_norm_ratio: Annotated[float, Field(gt=0)] = MAX_NORM_RATIO,
) -> float:
    """Check a peer's weights against own: names, shapes, dtypes, finite values, natures, and size.

    `name`: the peer, for messages; `own_norm`: `norm_of(own)`. The 2-norm of all the peer's floating-point
    tensors may not exceed `max_norm_ratio` times own's (a bound that no permutation of units changes).
    `natures`: of own's entries: a variance may not be negative; a constant that holds ±∞, and codes of quantised
    weights with their scales, must be equal to own's.
    `reference`: the norms after own training, if known: they then give the bound, for each tensor and for all
    together, whatever own norm is.
    Returns the largest factor by which the peer exceeds the reference (0: there is none). Reads one tensor at a time.
    Raises PeerError naming the agent and the tensor.
    """
    for key in own:
        if key not in peer:
            raise PeerError(f"{name}: tensor {key!r} is missing{nearest(key, peer)}; do the architectures agree?")
    for key in peer:
        if key not in own:
            raise PeerError(f"{name}: tensor {key!r} is not in our model{nearest(key, own)}")
    squares: dict[str, float] = {}
    codes = _codes_and_scales(natures)
    for key, ours in own.items():
        theirs = peer[key]
        if fault := unusual(theirs):
            raise PeerError(f"{name}: tensor {key!r} {fault}")
        if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            raise PeerError(f"{name}: tensor {key!r} is {_describe(theirs)}, ours {_describe(ours)}")
        nature = natures.of(key)
        if nature is Nature.CONSTANT and _norm(ours) is None:
            if not torch.equal(theirs.to(ours.device), ours):
                raise PeerError(
                    f"{name}: tensor {key!r} is a constant that is not finite, and differs from ours; "
                    "all agents must build their models with the same code"
                )
            continue
        if nature is Nature.FRAME and not torch.equal(theirs.to(ours.device), ours):
            raise PeerError(
                f"{name}: tensor {key!r} is what another one is written in, and differs from ours; agents whose models "
                "have it begin with the same weights"
            )
        if key in codes and not torch.equal(theirs.to(ours.device), ours):
            raise PeerError(
                f"{name}: tensor {key!r} belongs to a quantised weight, and differs from ours; codes cannot be "
                "averaged: train and exchange the weights dequantised, or adapters on one quantised base"
            )
        if nature is Nature.VARIANCE and (negative := int((theirs < 0).sum())):
            raise PeerError(f"{name}: tensor {key!r} is a variance and holds {negative} values below 0")
        norm = _norm(theirs)
        if norm is None:
            raise PeerError(f"{name}: tensor {key!r} holds {_count_non_finite(theirs)} values that are not finite")
        squares[key] = norm * norm
    if reference is not None:
        factor, where = reference.excess({key: square**0.5 for key, square in squares.items()})
        if factor > max_norm_ratio:
            raise PeerError(
                f"{name}: {f'tensor {where!r} is' if where else 'weights are'} {factor:.3g} times as large as this "
                f"agent's own have become in training; at most {max_norm_ratio:g} times is accepted"
            )
        return factor
    total = sum(squares.values()) ** 0.5
    if own_norm and total > max_norm_ratio * own_norm:
        largest = max(squares, key=squares.__getitem__)
        raise PeerError(
            f"{name}: weights of norm {total:.3g} exceed {max_norm_ratio:g} times ours ({own_norm:.3g}); "
            f"largest tensor {largest!r}"
        )
    return 0.0


def _codes_and_scales(natures: Natures) -> frozenset[str]:
    """Return the names of codes, and of the scales that belong to them: not those of observers of plain weights."""
    codes = [name for name, nature in natures.kinds.items() if nature is Nature.CODE]
    places = {name.rpartition(".")[0] for name in codes}
    scales = [name for name, nature in natures.kinds.items() if nature is Nature.SCALE]
    belong = [s for s in scales if s.rpartition(".")[0] in places or any(s.startswith(code) for code in codes)]
    return frozenset((*codes, *belong))


def unusual(tensor: Any) -> str:
    """Return why an entry's numbers cannot be read one by one, "" if they can."""
    if not isinstance(tensor, Tensor):
        inside = isinstance(tensor, Mapping) and any(
            isinstance(v, Tensor) for v in cast("Mapping[Any, Any]", tensor).values()
        )
        mend = "hand that in, if it is the model's state dict" if inside else "give it as one, or leave it out"
        return f"is a {type(tensor).__name__}, no tensor; {mend}"
    if tensor.layout != torch.strided:
        kind = str(tensor.layout).removeprefix("torch.").removeprefix("_")
        return f"is {kind.replace('_', ' ')}; give it dense, by to_dense()"
    if tensor.is_quantized:
        return "is quantised; give it dequantised, by dequantize()"
    return "has no values (it is on the meta device); load the model first" if tensor.is_meta else ""


def check_usual(own: Weights) -> None:
    """Raise MergeError for own weights whose numbers cannot be read one by one."""
    for key, tensor in own.items():
        if not isinstance(cast("Any", key), str):
            raise MergeError(f"own weights: the name {key!r} is a {type(key).__name__}; tensors are named by text")
        if fault := unusual(tensor):
            raise MergeError(f"own weights: tensor {key!r} {fault}")


def norms_of(own: Weights, natures: Natures = UNKNOWN, *, lenient: bool = False) -> dict[str, float]:
    """Return the 2-norms of all floating-point tensors, without constants that hold ±∞; MergeError names any other that
    is not finite, which `lenient` leaves out instead."""
    norms: dict[str, float] = {}
    for key, tensor in own.items():
        norm = _norm(tensor)
        if norm is None and (lenient or (natures.of(key) is Nature.CONSTANT and not tensor.isnan().any())):
            continue
        if norm is None:
            raise MergeError(
                f"own weights: tensor {key!r} holds {_count_non_finite(tensor)} values that are not finite"
            )
        norms[key] = norm
    return norms


def norm_of(own: Weights, natures: Natures = UNKNOWN, *, lenient: bool = False) -> float:
    """Return the 2-norm of all those tensors together."""
    return sum(norm * norm for norm in norms_of(own, natures, lenient=lenient).values()) ** 0.5


def _norm(tensor: Tensor) -> float | None:
    """2-norm in double precision, 0 for integers, None where a value is not finite."""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return 0.0
    values = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor
    if tensor.itemsize == 1:
        values = tensor.float()  # torch sums no 8-bit floats
    wide = torch.float32 if tensor.device.type == "mps" else torch.float64
    norm = float(torch.linalg.vector_norm(values, dtype=wide))
    if norm < float("inf"):
        return norm
    return None if _count_non_finite(tensor) else torch.finfo(torch.float64).max ** 0.5


def _count_non_finite(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor)).sum())


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
