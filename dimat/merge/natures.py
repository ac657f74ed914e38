"""Natures of state-dict entries: which of them are means of numbers, and which are not.

Most entries are parameters, which a combine method may merge freely. A mean of numbers would destroy the meaning of the
others: a variance is not negative; a mask of −∞ is the same in all models, and −∞ − (−∞) is not a number; the
vectors u and v of a power iteration belong to the weight on which they were iterated; an integer code
means nothing without its scale; two names of one tensor hold equal values. The pipeline treats these itself, in one
place, before and after every combine method (`settled.py`).

A model's modules decide what an entry is; without a model, names and values do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite, isnan

import torch
from torch import Tensor, nn

from dimat.merge.stages import Weights
from dimat.merge.ties import first_names, ties_of


class Nature(StrEnum):
    """The nature of an entry of a state dict."""

    PARAMETER = "parameter"
    MEAN = "mean"
    VARIANCE = "variance"
    """A variance or another mean of squares: never negative."""
    COUNT = "count"
    CONSTANT = "constant"
    """A buffer that nothing else explains: a mask, frequencies. It stays as it is where all models have the same."""
    VECTOR = "vector"
    """A singular vector from a power iteration on another entry."""
    FRAME = "frame"
    """A constant in which another entry is written: the base of an orthogonal parametrisation. All models share it."""
    CODE = "code"
    """Integers (or 8-bit floats) that stand for numbers together with a scale."""
    SCALE = "scale"
    """Scale or zero point of a code."""


@dataclass(frozen=True, slots=True)
class PowerIteration:
    """Names of a weight and of its left and right singular vectors. `dim`: the weight's axis of rows."""

    weight: str
    u: str
    v: str
    dim: int


@dataclass(frozen=True)
class Natures:
    """Natures of the entries of one model. `kinds`: by name; `first`: of tied names, the first one, by the others."""

    kinds: Mapping[str, Nature]
    iterations: tuple[PowerIteration, ...] = ()
    first: Mapping[str, str] = ()  # pyright: ignore[reportAssignmentType]

    def of(self, name: str) -> Nature:
        """Return the nature of an entry; an unknown one is a parameter."""
        return self.kinds.get(name, Nature.PARAMETER)


MASKED = 0.1
"""Least share of infinite values by which a tensor is taken for a mask."""

_MEAN = re.compile(r"(running|moving|ema|population|pop)_(mean|avg|average)$")
_VARIANCE = re.compile(
    r"(running|moving|ema|population|pop)_(var|variance|std|sq|square|squares|m2)$|(?:^|\.)(exp_avg_sq|sum_sq|m2)$"
)
_BESIDE_A_MEAN = re.compile(r"(?P<stem>(?:.*[._])?)(?<!log_)(?<!log\.)(?:var|variance|std|stddev)$")
"""Names that are a variance's where an entry beside them is called a mean: `obs_rms.var` beside `obs_rms.mean`."""
_MEANS = ("mean", "avg", "average")
_COUNT = re.compile(r"(^|[._])(num_batches_tracked|num_updates|step|count|counter|cluster_size|usage|hist|histogram)$")
_CONSTANT = re.compile(
    r"(mask|inv_freq|freqs_(?:cis|cos|sin)|position_ids|relative_position_index|masked_bias|attn_bias|causal|tril|alibi|slopes|min_val|max_val)"
    r"[^.]*$"
)
_PARAMETER = re.compile(r"(weight|bias|kernel|gamma|beta|lora_[AB]|weight_[gv]|original\d*)$")
_VECTOR = re.compile(r"(?:^|[._])[uv]\d*$")
_SCALES = ("scale", "scales", "scale_inv", "scale_w", "zero_point", "zero_points", "zeros", "absmax", "quant_map",
           "nested_absmax", "nested_quant_map", "SCB")  # fmt: skip
_ZEROS = ("zero_point", "zero_points", "zeros", "qzeros")
"""Ends of names of zero points, which belong to a scale: observers of weights that are numbers have them, too."""
CODES = re.compile(r"(?:^|.*\.)(?:weight|kernel|qweight|weight_packed|\w+_proj|\w+_blocks)")
"""Names of weights: if they are integers, they are codes, with a scale beside them or without one."""
_FLOATS_8 = frozenset(
    dtype for dtype in (getattr(torch, name, None) for name in dir(torch) if name.startswith("float8_")) if dtype
)


def natures_of(own: Weights, model: nn.Module | None = None) -> Natures:
    """Return the natures of own's entries, from the model's modules where there is one, and from names and values.

    Reads values only where a name leaves a question open.
    """
    parameters = frozenset[str]() if model is None else {n for n, _ in model.named_parameters(remove_duplicate=False)}
    buffers = frozenset[str]() if model is None else {n for n, _ in model.named_buffers(remove_duplicate=False)}
    kinds: dict[str, Nature] = {}
    iterations = _iterations(own)
    for found in iterations:
        kinds |= {found.u: Nature.VECTOR, found.v: Nature.VECTOR}
    kinds |= {name: nature for name, nature in _codes(own).items() if name not in kinds}
    kinds |= {name: Nature.FRAME for name in own if name not in parameters and _is_frame(name, own)}
    for name in own:
        if name in kinds:
            continue
        if _COUNT.search(name) and name not in parameters:
            kinds[name] = Nature.COUNT
        elif _MEAN.search(name) and name not in parameters:
            kinds[name] = Nature.MEAN
        elif name not in parameters and _is_variance(name, own) and _holds(own[name], lambda t: not (t < 0).any()):
            kinds[name] = Nature.VARIANCE
        elif _VECTOR.search(name) and name not in parameters and _holds(own[name], _is_unit):
            kinds[name] = Nature.VECTOR
        elif name in buffers or (name not in parameters and _constant_of(name, own)):
            kinds[name] = Nature.CONSTANT
    return Natures(kinds, iterations, first_names(ties_of(own, model)))


def _is_frame(name: str, own: Weights) -> bool:
    place, _, last = name.rpartition(".")
    stem, _, number = place.rpartition(".")
    return last == "base" and number.isdecimal() and "parametrizations." in stem and f"{stem}.original" in own


def _is_variance(name: str, own: Weights) -> bool:
    """Tell whether an entry is called a variance, by itself or by the mean beside it."""
    beside = _BESIDE_A_MEAN.match(name)
    by_mean = beside is not None and any(beside["stem"] + mean in own for mean in _MEANS)
    return by_mean or _VARIANCE.search(name) is not None


def _holds(tensor: Tensor, test: Callable[[Tensor], bool]) -> bool:
    return tensor.is_floating_point() and bool(test(tensor.detach()))


def _is_unit(tensor: Tensor) -> bool:
    return tensor.numel() > 1 and abs(float(torch.linalg.vector_norm(tensor.float())) - 1) < 1e-2


def is_constant(name: str, tensor: Tensor) -> bool:
    """Tell whether an entry of a file is a constant: by its name, or since it holds ±∞ as masks do.

    Then all its finite values are one, or at least a tenth of an entry that is not called like a parameter is infinite:
    a tensor of which some values overflowed is no constant.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return _CONSTANT.search(name) is not None
    values = tensor.detach()
    low, high = (float(bound) for bound in torch.aminmax(values.float()))
    if isnan(low) or _CONSTANT.search(name):
        return not isnan(low)
    if isfinite(low) and isfinite(high):
        return False
    finite = values[values.isfinite()]
    infinite = values.numel() - finite.numel()
    if infinite < 2 or not finite.numel():
        return False
    if bool((finite == finite.reshape(-1)[0]).all()):
        return True
    return _PARAMETER.search(name) is None and infinite >= MASKED * values.numel()


def _constant_of(name: str, own: Weights) -> bool:
    """Tell whether an entry is a constant; weights of files are not read for that (biases, which are small, are)."""
    if not isinstance(own, dict) and (_CONSTANT.search(name) or (_PARAMETER.search(name) and "bias" not in name)):
        return _PARAMETER.search(name) is None
    return is_constant(name, own[name])


def _iterations(own: Weights) -> tuple[PowerIteration, ...]:
    """Return the power iterations of spectral normalisation: torch's two, and the widespread one by `weight_bar`."""
    found: list[PowerIteration] = []
    for u in own:
        if u.endswith("._u"):
            stem, v = u.removesuffix("._u"), u.removesuffix("_u") + "_v"
            place, _, number = stem.rpartition(".")
            weights = [f"{place}.original"] if number == "0" else []
        elif u.endswith("_u"):
            stem, v = u.removesuffix("_u"), u.removesuffix("_u") + "_v"
            weights = [f"{stem}_orig", f"{stem}_bar"]
        else:
            continue
        weight = next((name for name in weights if name in own), None)
        if weight is None or v not in own:
            continue
        dim = _rows_of(own[weight].detach(), own[u].detach(), own[v].detach())
        if dim is not None:
            found.append(PowerIteration(weight, u, v, dim))
    return tuple(found)


def as_matrix(weight: Tensor, dim: int) -> Tensor:
    """Return a weight as the matrix whose rows are its indices along an axis, as spectral normalisation has it."""
    return weight.movedim(dim, 0).flatten(1) if weight.ndim > 1 else weight.reshape(-1, 1)


def _rows_of(weight: Tensor, u: Tensor, v: Tensor) -> int | None:
    """Return the axis of a weight along which u lies; of several that fit the one for which u is W v best."""
    best: tuple[float, int] | None = None
    for dim in range(weight.ndim):
        matrix = as_matrix(weight, dim)
        if matrix.shape != (u.numel(), v.numel()):
            continue
        again = torch.nn.functional.normalize(matrix.float() @ v.reshape(-1).float(), dim=0)
        off = float((again - u.reshape(-1).float()).norm())
        if best is None or off < best[0]:
            best = (off, dim)
    return None if best is None else best[1]


def _codes(own: Weights) -> dict[str, Nature]:
    """Return codes with a scale beside them, and those scales; matrices of integers that are called weights, too.

    A scale is called like its code (`weight_scale`, `weight.absmax`) or stands beside it (`qweight` and `scales`).
    """
    scales = [name for name in own if name.endswith(_SCALES)]
    named = [name for name in own if CODES.fullmatch(name) and own[name].ndim > 1 and _whole(own[name])]
    found = {name: Nature.CODE for name in named if own[name].dtype != torch.int64}  # those are indices
    for scale in scales:
        place = scale.rpartition(".")[0]
        named = [n for n in (_stem(scale), place) if n in own]
        near = ("qweight", "weight", "qzeros", "g_idx", "zero_point")
        beside = [f"{place}.{code}" if place else code for code in near]
        for code in {*named, *(n for n in beside if n in own)}:
            if _whole(own[code]) or own[code].dtype in _FLOATS_8:
                found |= {code: Nature.SCALE if code.endswith(_ZEROS) else Nature.CODE, scale: Nature.SCALE}
    return found


def _whole(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool


def _stem(scale: str) -> str:
    end = max((end for end in _SCALES if scale.endswith(end)), key=len)
    return scale.removesuffix(end).rstrip("._")
