"""Keys of config.json that change what weights compute, and configs in one form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

FUNCTION = re.compile(
    r"(?:.*\.)?(?:\w*_act|hidden_activation|activation|activation_function|\w*act_fn|feed_forward_proj"
    r"|\w*attention_heads|num_key_value_heads|n_heads?|num_heads|num_kv_heads|\w*head_dim|multi_query"
    r"|new_decoder_architecture|\w*num_groups|\w*stride\w*|\w*dilation\w*|window_size|time_step_limit"
    r"|(?:\w+_)?rope_.*|rotary_.*|partial_rotary_factor|alibi.*|position_embedding_type|relative_attention.*"
    r"|pos_att_type|position_biased_input|local_attention|global_attn_every_n_layers|attention_(?:type|window|chunk_size)"
    r"|\w*norm_eps\w*|layer_norm_epsilon|epsilon|norm_type|normalization|parallel_attn|use_parallel_residual"
    r"|parallel_residual|apply_residual_connection_post_layernorm|do_layer_norm_before|tie_word_embeddings"
    r"|sliding_window\w*|use_sliding_window|max_window_layers|layer_types|attention_types|is_decoder"
    r"|use_bidirectional\w*"
    r"|\w*softcapping|query_pre_attn_scalar|logits?_scal\w*|\w+_multiplier|scale_\w+|use_qk_norm|qk_norm\w*"
    r"|num_experts_per_tok|n_group|topk_\w+|norm_topk_prob|routed_scaling_factor|scoring_func|moe_\w*topk"
    r"|num_experts_per_token|image_size|patch_size|num_channels|feature_layer\w*|vision_feature\w*|use_cls_token"
    r"|\w*pooling\w*|(?:image|video|audio|vision\w*)_token_(?:id|index)|problem_type|bias_type|attn_impl_scale|residual_scale|depth_scale)"
)
"""Keys of config.json that change what the same weights compute."""


def flat_config(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return the keys of a config, including those of nested tables, dotted, in one form for all writers of the
    file."""
    found: dict[str, Any] = {}
    for key, value in ((str(key), value) for key, value in config.items()):
        if isinstance(value, dict) and key not in ("rope_parameters", "rope_scaling"):
            found |= flat_config(cast("dict[str, Any]", value), f"{before}{key}.")
        elif value is not None:
            found[f"{before}{key}"] = value
    theta, scaling = found.get(before + "rope_theta"), found.pop(before + "rope_scaling", None)
    scaling = found.pop(before + "rope_parameters", scaling)
    if isinstance(scaling, dict):
        table = dict(cast("dict[str, Any]", scaling))
        theta = table.pop("rope_theta", theta)
        kind = table.pop("rope_type", table.pop("type", "default"))
        table.pop("type", None)
        found |= {before + "rope_scaling": {"rope_type": kind, **table}} if kind != "default" or table else {}
    elif scaling is not None:  # no table: kept as it is, so that it differs from one
        found[before + "rope_scaling"] = scaling
    if isinstance(theta, int | float) and not isinstance(theta, bool):
        found[before + "rope_theta"] = float(theta)
    if found.get(before + "use_sliding_window") is False:  # then these change nothing, and are often left as they were
        for key in ("sliding_window", "max_window_layers"):
            found.pop(before + key, None)
    return found


def same_setting(one: Any, two: Any) -> bool:
    """Tell whether two values of a config mean the same: 8 and 8.0 do; true and 1, or "8" and 8, do not."""
    if isinstance(one, dict) and isinstance(two, dict):
        mine, theirs = cast("dict[Any, Any]", one), cast("dict[Any, Any]", two)
        return mine.keys() == theirs.keys() and all(same_setting(value, theirs[key]) for key, value in mine.items())
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        pair = cast("list[Any]", one), cast("list[Any]", two)
        return len(pair[0]) == len(pair[1]) and all(map(same_setting, *pair))
    if isinstance(one, bool) is not isinstance(two, bool):
        return False
    return bool(one == two or (one != one and two != two))
