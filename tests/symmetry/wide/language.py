"""The zoo's models of transformers: tiny, from a configuration alone, with the structure of the real ones.

Two layers, four heads, two key and value heads where they are grouped; nothing is fetched.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

from tests.symmetry.wide.entry import Built, Entry, images, words
from tests.symmetry.zoo import _torchvision_models as torchvision_models

VOCABULARY = {"vocab_size": 101}
PLAIN = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**VOCABULARY, **PLAIN, **TOKENS, "max_position_embeddings": 64}
GROUPED = {**DECODER, "num_key_value_heads": 2}
_CACHED = {"use_cache": False}
CLASSIFIED = {**VOCABULARY, **PLAIN, "max_position_embeddings": 64, "num_labels": 3}


@cache
def _transformers() -> Any:
    """Import transformers, which must neither look for files elsewhere nor find a torchvision that fails to load."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torchvision_models()
    import transformers

    return transformers


def text(
    name: str,
    kind: str,
    config: str,
    options: dict[str, Any],
    groups: int | None = None,
    heads: int | None = None,
    *,
    given: dict[str, Any] | None = None,
    outputs: Sequence[int | str] | None = ("logits",),
    implementation: str = "sdpa",
    tolerance: float = 1e-9,
    unseen: bool = False,
    least_coverage: float | None = None,
    exception: str = "",
) -> Entry:
    def make() -> Built:
        library = _transformers()
        settings = getattr(library, config)(**options, attn_implementation=implementation)
        inputs: dict[str, Any] = {"input_ids": words(), **(_CACHED if given is None else given)}
        return getattr(library, kind)(settings), inputs

    return Entry(
        name,
        "transformers",
        "other",
        make,
        groups,
        heads,
        outputs,
        unseen,
        tolerance,
        least_coverage,
        exception,
    )


def image(name: str, kind: str, config: str, options: dict[str, Any], outputs: Sequence[str]) -> Entry:
    def make() -> Built:
        library = _transformers()
        return getattr(library, kind)(getattr(library, config)(**options)), {"pixel_values": images(32)}

    return Entry(name, "transformers", "other", make, outputs=outputs)


def _t5() -> Built:
    library = _transformers()
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    config = library.T5Config(**VOCABULARY, **sizes, decoder_start_token_id=0)
    inputs = {"input_ids": words(9), "decoder_input_ids": words(7), **_CACHED}
    return library.T5ForConditionalGeneration(config), inputs


_NONE: dict[str, Any] = {}
FP32 = "computes its norm in float32"
_LLAMA = ("LlamaForCausalLM", "LlamaConfig")
_DISTIL = {**VOCABULARY, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "max_position_embeddings": 64}
_GPT2 = {**VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
_VIT = {**PLAIN, "image_size": 32, "patch_size": 8}
_MIXTRAL = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
_MAMBA = {**VOCABULARY, **TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "use_mambapy": False}
_OPT = {**DECODER, "ffn_dim": 96, "word_embed_proj_dim": 64}
_ALBERT = {**CLASSIFIED, "embedding_size": 32}
_FALCON = {**VOCABULARY, **TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_DEBERTA = {**CLASSIFIED, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
_BLOOM = {**VOCABULARY, **TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4}

ENTRIES = (
    text("gpt2", "GPT2LMHeadModel", "GPT2Config", {**_GPT2, "eos_token_id": 2}, 9, 4),
    text("bert", "BertForSequenceClassification", "BertConfig", CLASSIFIED, 10, 4, given=_NONE),
    # the hidden states beside what the pooler gives would pin the stream
    text("bert_pooler", "BertModel", "BertConfig", CLASSIFIED, given=_NONE, outputs=("pooler_output",)),
    text("distilbert", "DistilBertForSequenceClassification", "DistilBertConfig", _DISTIL, given=_NONE),
    image("vit", "ViTForImageClassification", "ViTConfig", _VIT, ("logits",)),
    image(
        "clip_vision",
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        {**_VIT, "projection_dim": 24},
        ("image_embeds",),
    ),
    text("llama_sdpa", *_LLAMA, GROUPED, 9, 4, tolerance=1e-5, exception=FP32),
    text("llama_eager", *_LLAMA, GROUPED, 9, 4, implementation="eager", tolerance=1e-5, exception=FP32),
    text("llama_tied", *_LLAMA, {**GROUPED, "tie_word_embeddings": True}, 9, 4, tolerance=1e-5, exception=FP32),
    text("qwen2", "Qwen2ForCausalLM", "Qwen2Config", GROUPED, tolerance=1e-5, exception=FP32),
    text("qwen3", "Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 16}, tolerance=1e-5, exception=FP32),
    text("mistral", "MistralForCausalLM", "MistralConfig", GROUPED, tolerance=1e-5, exception=FP32),
    text("phi3", "Phi3ForCausalLM", "Phi3Config", GROUPED, tolerance=1e-5, exception=FP32),
    text("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", DECODER),
    # what the encoder hands on is an output too, and would pin its stream
    Entry("t5", "transformers", "other", _t5, outputs=("logits",), tolerance=1e-5, exception=FP32),
    text("mixtral", "MixtralForCausalLM", "MixtralConfig", _MIXTRAL, tolerance=1e-5, exception=FP32),
    text(
        "mixtral_batched",
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_MIXTRAL, "experts_implementation": "batched_mm"},
        tolerance=1e-5,
        exception=FP32,
    ),
    text("mamba", "MambaForCausalLM", "MambaConfig", _MAMBA, implementation="eager", tolerance=1e-5, exception=FP32),
    text(
        "gemma",
        "GemmaForCausalLM",
        "GemmaConfig",
        {**GROUPED, "head_dim": 16},
        tolerance=1e-5,
        exception=FP32,
        unseen=True,
    ),
    text("opt", "OPTForCausalLM", "OPTConfig", _OPT, unseen=True),
    text(
        "bloom",
        "BloomForCausalLM",
        "BloomConfig",
        _BLOOM,
        implementation="eager",
        unseen=True,
        least_coverage=0.94,
        exception="each head has a slope of its own (ALiBi): heads stay where they are",
    ),
    text("roberta", "RobertaForSequenceClassification", "RobertaConfig", CLASSIFIED, given=_NONE, unseen=True),
    text("albert", "AlbertForSequenceClassification", "AlbertConfig", _ALBERT, given=_NONE, unseen=True),
    text(
        "falcon",
        "FalconForCausalLM",
        "FalconConfig",
        _FALCON,
        unseen=True,
        least_coverage=0.88,
        exception="queries, keys and values lie in one tensor by number: heads stay where they are",
    ),
    text(
        "deberta_v2",
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        _DEBERTA,
        given=_NONE,
        implementation="eager",
        unseen=True,
    ),
    text("starcoder2", "Starcoder2ForCausalLM", "Starcoder2Config", GROUPED, unseen=True),
)
