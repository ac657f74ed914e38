"""Settings that determine the meaning of weights: quantisation, config.json, class names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from dimat.errors import DataError
from dimat.merge.models.config_keys import FUNCTION, flat_config, same_setting
from dimat.merge.natures import CODES
from dimat.merge_files.files import CONFIG, ModelFiles, told

PASSED = re.compile(
    r"(?:.*\.)?(?:_.*|torch_dtype|dtype|transformers_version|architectures|auto_map|use_cache|\w*drop\w*|\w+_init_value"
    r"|(?:pad|bos|cls|sep|unk|mask)_token_id"
    r"|initializer_\w+|init_\w+|gradient_checkpointing|output_\w+|return_dict\w*|task_specific_params|tokenizer_class"
    r"|attn_implementation|pretraining_tp|finetuning_task|name_or_path|model_max_length|max_position_embeddings|n_ctx"
    r"|unsloth_\w+|quantization_config|transformers_weights|num_labels|router_\w*coef|\w*aux_loss\w*)"
)
"""Keys that may differ without a note: they describe how the model was trained, is run or is named."""

DEFAULTS: Mapping[str, Any] = {"rope_theta": 10000.0}
"""Default values of omitted keys in nearly all architectures, used if transformers has none."""

OFF = re.compile(r"(?:.*\.)?(?:rope_scaling|\w*softcapping|sliding_window)")
"""Keys that are off where neither a config nor its architecture gives them a value."""

ALIKE: Sequence[set[str]] = ({"llama", "mistral"},)
"""Architectures that compute the same from the same tensors, if their settings are equal."""

QUANTISED = re.compile(
    r"(?:^|.*[._])(?:qweight|qzeros|weight_packed|weight_scale(?:_inv)?|weight_zero_point|absmax|quant_map|quant_state\..*"
    r"|nested_absmax|SCB|W_q|_data|_scale|scale_inv|blocks|input_scale)"
)
"""Names of tensors in quantised weights: codes, and their scales."""


def check_whole(model: ModelFiles, *, codes: bool = True) -> None:
    """Raise DataError if a model's weights are quantised: codes mean nothing without their scales.

    `codes`: integer weights count as codes, even if nothing else says so.
    """
    settings = model.config.get("quantization_config") or model.config.get("compression_config")
    if settings:
        table = cast("dict[str, Any]", settings) if isinstance(settings, dict) else {}
        kind = str(table.get("quant_method", "a method that is not named"))
        bits = f", {table['bits']} bits" if "bits" in table else ""
        raise _quantised(model, f"{CONFIG} has quantization_config ({kind}{bits})")
    for name, info in model.infos.items():
        if QUANTISED.fullmatch(name) and _has_codes(model, name):
            raise _quantised(model, f"tensor {name!r} is {info}, beside weights as codes")
        whole = info.dtype.is_floating_point or info.dtype.is_complex or info.dtype == torch.bool or len(info.shape) < 2
        if codes and not whole and CODES.fullmatch(name):
            raise _quantised(model, f"tensor {name!r} is {info}, a weight as integer codes")


def check_configs(models: Sequence[ModelFiles]) -> list[str]:
    """Compare the config.json of models; describe the differences that may be intended.

    An omitted key has the default of its architecture, from transformers, if that is installed. Raises DataError for
    differences in keys that change the function of the same weights, for architectures that are not known to compute
    the same, and for classes in another order.
    """
    told_of = [(str(model.path), model.config) for model in models if model.config]
    found = list[str]()
    silent = [str(model.path) for model in models if model.folder and not model.adapter and not model.config]
    notes = [f"{path} has no {CONFIG}: it is taken to compute as {told_of[0][0]} does" for path in silent if told_of]
    for other in told_of[1:]:
        differing, more = _compared(told_of[0], other)
        found += differing
        notes += more
    if found:
        raise DataError(f"the models compute differently, {told(found)}; the same weights mean something else in each")
    return notes


def check_architecture(model: nn.Module, hook: str, own: ModelFiles) -> None:
    """Compare the first model's config.json with the config of the architecture for running it, if that is
    transformers'.

    Raises DataError as `check_configs` does.
    """
    as_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if not own.config or not callable(as_dict):
        return
    found, _ = _compared((str(own.path), own.config), (f"the model {hook!r}", cast("dict[str, Any]", as_dict())))
    if found:
        raise DataError(f"{own.path} does not fit the model {hook!r}, {told(found)}; build it with the same settings")


Named = tuple[str, Mapping[str, Any]]
"""The source of a config, in words, and the config."""


def _compared(first: Named, other: Named) -> tuple[list[str], list[str]]:
    """Describe the differences of two configs: those that change the function, and those that may be intended."""
    mine, theirs = flat_config(first[1]), flat_config(other[1])
    found, notes = _class_differences(first, other), list[str]()
    kinds = [str(config.get("model_type", "")) for config in (mine, theirs)]
    whole: list[dict[str, Any]] | None = None
    if kinds[0] != kinds[1] and all(kinds):
        whole = [_effective(first[1]), _effective(other[1])]
        if not any({*kinds} <= alike for alike in ALIKE):
            found.append(f"model_type is {kinds[0]!r} in {first[0]}, {kinds[1]!r} in {other[0]}")
        else:  # a key that one of the architectures does not have is one that changes nothing there
            known = [{key: v for key, v in effective.items() if FUNCTION.fullmatch(key)} for effective in whole]
            mine, theirs = known[0] | mine, known[1] | theirs
    for key in sorted((mine.keys() | theirs.keys()) - {"id2label", "label2id", "model_type"}):
        one, two = mine.get(key), theirs.get(key)
        if same_setting(one, two) or PASSED.fullmatch(key) or key.startswith(("id2label.", "label2id.")):
            continue
        if (one is None and _inside(key, mine)) or (two is None and _inside(key, theirs)):
            continue  # told with the value that stands in place of the table
        if inner := [name for name in (mine if one is None else theirs) if name.startswith(f"{key}.")]:
            changes = any(map(FUNCTION.fullmatch, inner))
            words = [f"{where} in {which[0]}" for where, which in zip((_or_table(one), _or_table(two)), (first, other))]
            (found if changes else notes).append(f"{'' if changes else f'{CONFIG}: '}{key} is {', '.join(words)}")
            continue
        changes = FUNCTION.fullmatch(key) is not None
        if changes and (one is None or two is None):
            whole = whole or [_effective(first[1]), _effective(other[1])]
            one = _left_out(key, mine, whole[0]) if one is None else one
            two = _left_out(key, theirs, whole[1]) if two is None else two
            if same_setting(one, two):
                continue
        words = f"{key} is {_said(one)} in {first[0]}, {_said(two)} in {other[0]}"
        apart = kinds[0] != kinds[1] and whole is not None and all(whole)  # then a key that is not there says so
        off = OFF.fullmatch(key) and (key.endswith("rope_scaling") or (whole is not None and all(whole)))
        if changes and (apart or off or (one is not None and two is not None)):
            found.append(words)
        else:
            notes.append(f"{CONFIG}: {words}")
    return found, notes


def _said(value: Any) -> str:
    return "left out" if value is None else repr(value)


def _or_table(value: Any) -> str:
    return "a table" if value is None else repr(value)


def _inside(key: str, settings: Mapping[str, Any]) -> bool:
    """Tell whether a value stands where a dotted key needs a table."""
    return any(key.startswith(f"{other}.") for other in settings if key.startswith(other))


def _effective(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the defaults of its architecture; nothing if transformers is missing or does not know it."""
    from dimat.tasks.huggingface.library import library

    try:
        mapping: Any = library("transformers").models.auto.configuration_auto.CONFIG_MAPPING
        whole: Any = mapping[str(config.get("model_type", ""))].from_dict(dict(config)).to_dict()
    except Exception:  # transformers raises whatever its own code does; then a difference is noted, not judged
        return {}
    return flat_config(whole)


def _has_codes(model: ModelFiles, name: str) -> bool:
    """Tell whether a module, or one above it, has tensors of integers or of 8-bit floats."""
    module = name.rpartition(".")[0]
    return any(
        (info.dtype.itemsize == 1 or not info.dtype.is_floating_point)
        and info.dtype != torch.bool
        and len(info.shape) > 0
        and (other.rpartition(".")[0] + ".").startswith(module + "." if module else "")
        for other, info in model.infos.items()
    )


def _quantised(model: ModelFiles, why: str) -> DataError:
    return DataError(
        f"{model.path} is quantised: {why}; codes cannot be averaged. Merge the models as they were before they were "
        "quantised, or dequantise them first (transformers: model.dequantize(), then save_pretrained)"
    )


def _left_out(key: str, settings: Mapping[str, Any], effective: Mapping[str, Any]) -> Any:
    """Return the value of a key that is left out; None if it is not known."""
    if effective:
        return effective.get(key)
    before, dot, last = key.rpartition(".")
    return settings.get(f"{before}{dot}num_attention_heads") if last == "num_key_value_heads" else DEFAULTS.get(last)


def _class_differences(first: Named, other: Named) -> list[str]:
    """Describe outputs to which two models give different class names."""
    for key in ("id2label", "label2id"):
        one, two = first[1].get(key), other[1].get(key)
        if one is not None and two is not None and type(one) is not type(two):
            kinds = ["a table" if isinstance(value, dict) else repr(value) for value in (one, two)]
            return [f"{key} is {kinds[0]} in {first[0]}, {kinds[1]} in {other[0]}"]
    mine, theirs = _classes(first[1]), _classes(other[1])
    if mine is None or theirs is None or mine == theirs:
        return []
    for key in sorted(mine.keys() | theirs.keys(), key=lambda key: (len(key), key)):
        if mine.get(key) != theirs.get(key):
            return [f"class {key} is {mine.get(key)!r} in {first[0]}, {theirs.get(key)!r} in {other[0]}"]
    return []


def _classes(config: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the classes' names by output; None if they are not named."""
    names, numbers = config.get("id2label"), config.get("label2id")
    found: dict[str, str] = {}
    if isinstance(names, dict) and names:
        found = {str(key): str(name) for key, name in cast("dict[Any, Any]", names).items()}
    elif isinstance(names, list | str) and names:  # in their order; a text is no list of names, and yet not passed over
        found = {str(i): str(name) for i, name in enumerate(cast("list[Any]", names))}
    elif isinstance(numbers, dict):
        found = {str(number): str(name) for name, number in cast("dict[Any, Any]", numbers).items()}
    if not found:
        return None
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in found.values()) else found
