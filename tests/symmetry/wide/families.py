"""The zoo's families beside the common ones: mixtures of experts, latent attention, ALiBi, state-space models, others.

Tiny models of transformers, with the structure of the real ones; those of our own that no library brings are in
`structures`. No rule was written for any of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.symmetry.wide.entry import Entry
from tests.symmetry.wide.language import CLASSIFIED, DECODER, FP32, GROUPED, PLAIN, TOKENS, VOCABULARY, image, text

_NONE: dict[str, Any] = {}
_MOE = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    **DECODER,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_BART = {
    **VOCABULARY,
    **TOKENS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "num_labels": 3,
}
_GPTJ = {**VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8, "bos_token_id": 1}
_NEO = {
    **VOCABULARY,
    **TOKENS,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "max_position_embeddings": 64,
}
_MPT = {**VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 32}
_MAMBA2 = {
    **VOCABULARY,
    **TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 8,
    "num_heads": 8,
    "head_dim": 8,
    "n_groups": 2,
    "chunk_size": 8,
}


def _decoder(name: str, kind: str, options: dict[str, Any], *, fp32: bool = True, **more: Any) -> Entry:
    if fp32:
        more = {"tolerance": 1e-5, "exception": FP32, **more}
    return text(name, f"{kind}ForCausalLM", f"{kind}Config", options, unseen=True, **more)


def _reader(name: str, kind: str, options: dict[str, Any], **more: Any) -> Entry:
    return text(name, f"{kind}ForSequenceClassification", f"{kind}Config", options, given=_NONE, unseen=True, **more)


def _seer(name: str, kind: str, options: dict[str, Any]) -> Entry:
    return image(name, f"{kind}ForImageClassification", f"{kind}Config", {**options, "num_labels": 3}, ("logits",))


ENTRIES = (
    _decoder(
        "gpt_oss", "GptOss", {**_LOCAL, "head_dim": 16, "layer_types": ["full_attention"] * 2}, implementation="eager"
    ),
    _decoder("qwen2_moe", "Qwen2Moe", {**_MOE, "shared_expert_intermediate_size": 24}),
    _decoder("qwen3_moe", "Qwen3Moe", {**_MOE, "head_dim": 16}),
    _decoder("olmoe", "Olmoe", _MOE),
    _decoder("granite_moe", "GraniteMoe", _LOCAL),
    _decoder("phimoe", "Phimoe", _LOCAL),
    replace(
        _decoder("deepseek_v3", "DeepseekV3", _LATENT),
        least_coverage=0.85,
        exception=f"{FP32}; experts are chosen within groups of them, so that they cannot all be exchanged",
    ),
    _decoder("deepseek_v2", "DeepseekV2", {**_LATENT, "topk_method": "greedy"}),
    _decoder("mpt", "Mpt", _MPT, implementation="eager"),
    _decoder("olmo2", "Olmo2", GROUPED),
    _decoder("gemma2", "Gemma2", {**GROUPED, "head_dim": 16}, implementation="eager"),
    _decoder("granite", "Granite", GROUPED),
    _decoder("stablelm", "StableLm", GROUPED),
    _decoder("cohere2", "Cohere2", GROUPED),
    _decoder("helium", "Helium", {**GROUPED, "head_dim": 16}),
    _decoder("glm4", "Glm4", {**GROUPED, "head_dim": 16}),
    _decoder("nemotron", "Nemotron", GROUPED),
    _decoder("smollm3", "SmolLM3", GROUPED),
    _decoder("gptj", "GPTJ", {**_GPTJ, "eos_token_id": 2}, implementation="eager"),
    _decoder("gpt_neo", "GPTNeo", _NEO, implementation="eager"),
    _decoder("mamba2", "Mamba2", _MAMBA2, implementation="eager"),
    _decoder("bart", "Bart", _BART, fp32=False),
    _reader("electra", "Electra", {**CLASSIFIED, "embedding_size": 32}),
    replace(
        _reader("fnet", "FNet", CLASSIFIED, implementation="eager"),
        least_coverage=0.5,
        exception="transforms its units",
    ),
    _reader("mpnet", "MPNet", CLASSIFIED, implementation="eager"),
    _reader("squeezebert", "SqueezeBert", {**CLASSIFIED, "embedding_size": 64}, implementation="eager"),
    _reader("roformer", "RoFormer", {**CLASSIFIED, "embedding_size": 64}, implementation="eager"),
    _reader("convbert", "ConvBert", {**CLASSIFIED, "embedding_size": 64}, implementation="eager"),
    _seer("convnext_v2", "ConvNextV2", {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1], "image_size": 32}),
    _seer("dinov2", "Dinov2", {**PLAIN, "image_size": 32, "patch_size": 8, "mlp_ratio": 2}),
    _seer("beit", "Beit", {**PLAIN, "image_size": 32, "patch_size": 8, "use_relative_position_bias": True}),
    _seer(
        "swin_v2",
        "Swinv2",
        {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "image_size": 32, "window_size": 4},
    ),
)
