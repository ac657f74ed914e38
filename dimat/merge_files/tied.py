"""Tensors that only some files hold: recomputed buffers, and tied weights stored once.

transformers ignores buffers that follow from the config (rotary frequencies, position ids, causal masks), and may or
may not store an output layer that is tied to the embedding, depending on its version and the config.

This module passes such a layer to the method once, found before any tensor is merged, also from headers and configs;
other tied names are made equal after the method (`merge/settled.py`). `merge/ties.py` finds the tied names for both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dimat.errors import DataError
from dimat.merge.ties import EMBEDDING, HEADS, tied_in, ties_of
from dimat.merge_files.files import ModelFiles
from dimat.weights.header import TensorInfo

COMPUTED = re.compile(
    r"(?:.*\.)?(?:\w*inv_freq|position_ids|masked_bias|relative_position_index|relative_coords_table|cos_cached"
    r"|sin_cached|attn\.bias|attention\.bias)"
)
"""Names of buffers that follow from the config. The biases among them are causal masks: (1, 1, length, length)."""


@dataclass(frozen=True)
class Together:
    """Models with the same tensors. `kept`: the first model's tensors that no method merges, as they follow from the
    config; `tied`: those that are the merged tensor of another name."""

    models: tuple[ModelFiles, ...]
    base: ModelFiles | None
    kept: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict[str, str])


def is_computed(name: str, info: TensorInfo) -> bool:
    """Tell whether a tensor is a buffer that the model computes from its config."""
    if COMPUTED.fullmatch(name) is None:
        return False
    return not name.endswith("n.bias") or (len(info.shape) == 4 and info.shape[:2] == (1, 1))


def bring_together(models: Sequence[ModelFiles], base: ModelFiles | None) -> Together:
    """Return models with the tensors of the first one: tied weights under both names, without computed buffers.

    Tensors that are missing for another reason stay missing, and the check that follows reports them. Raises DataError
    if one model's output layer is its embedding, and another's, which is written, is not.
    """
    inputs = [*models, *([] if base is None else [base])]
    names = {name: info for model in reversed(inputs) for name, info in model.infos.items()}
    apart = {name for name, info in names.items() if is_computed(name, info)}
    apart = {name for name in apart if any(name not in model for model in inputs)} | (
        {name for name in apart if names[name].dtype.is_floating_point}
    )
    own = models[0]
    aliases = _aliases_of(inputs, [name for name in names if name not in apart])
    stored = [name for name in own if name not in apart]
    tied = {name: twin for name, twin in aliases.items() if name in own and all(_same(m, name, twin) for m in inputs)}
    for name, twin in aliases.items():
        untied = [model for model in inputs if not _same(model, name, twin)]
        if untied and (name not in own or own.config.get("tie_word_embeddings") is True):
            one = next(model for model in inputs if model not in untied)
            raise DataError(
                f"{name!r} is {twin!r} in {one.path} (tied), and a separate weight in {untied[0].path}; merge with "
                f"{untied[0].path} first, so that both are written"
            )
    merged = [name for name in stored if name not in tied]

    def shown(model: ModelFiles) -> ModelFiles:
        used = {name: twin for name, twin in aliases.items() if name in merged and name not in model}
        rest = [name for name in model if name not in merged and name not in apart and name not in aliases]
        seen = [name for name in merged if name in model or name in used]
        return model.seen_as([*seen, *rest], used)

    kept = tuple(name for name in own if name in apart)
    if not kept and not aliases and not apart:
        return Together(tuple(models), base)
    return Together(tuple(map(shown, models)), None if base is None else shown(base), kept, tied)


def _aliases_of(inputs: Sequence[ModelFiles], names: Sequence[str]) -> dict[str, str]:
    """Return the tensors that models store twice, or only some of them store, with the one to which they are tied."""
    found: dict[str, str] = {}
    groups = [ties_of(model) for model in inputs]
    everywhere = [name for name in names if all(name in model for model in inputs)]
    for name in names:
        having = [number for number, model in enumerate(inputs) if name in model]
        info = inputs[having[0]].infos[name]
        if name in found.values() or len(info.shape) < 2 or not info.dtype.is_floating_point:
            continue
        free = [one for one in everywhere if one != name and one not in found]
        if len(having) == len(inputs):  # stored twice by all: the embedding is the tensor, the other one its alias
            twins = [n for n in free if EMBEDDING.fullmatch(n) and all(n in group.get(name, ()) for group in groups)]
            found |= {name: twins[0]} if twins else {}
            continue
        twin = next((one for one in free if one in groups[having[0]].get(name, ())), None)
        lacking = [model for model in inputs if name not in model]
        if (
            twin is None
            and HEADS.fullmatch(name)
            and all(m.config.get("tie_word_embeddings") is not False for m in lacking)
        ):
            same = (one for one in free if inputs[having[0]].infos[one].shape == info.shape)
            twin = next((one for one in same if EMBEDDING.fullmatch(one)), None)
        if twin is not None:
            found[name] = twin
    return found


def _same(model: ModelFiles, name: str, twin: str) -> bool:
    return name not in model or tied_in(model, name, twin)
