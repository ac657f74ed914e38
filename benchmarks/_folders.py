"""Models in the layout of the Hugging Face hub that nobody trained: a Llama's tensors in bfloat16, with a config.json
that other tools read. Values are random, and written far faster than a model could be drawn."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

POOL = 1 << 22
"""Random numbers that are drawn once; a tensor is made of them from some place on, repeated."""


@dataclass(frozen=True)
class Llama:
    """The sizes of a Llama. `heads` of 64; embedding and output layer are two tensors."""

    hidden: int
    inner: int
    layers: int
    vocabulary: int = 32_000

    def shapes(self) -> dict[str, tuple[int, ...]]:
        h, i = self.hidden, self.inner
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, h)}
        for k in range(self.layers):
            at = f"model.layers.{k}."
            shapes |= {f"{at}self_attn.{part}_proj.weight": (h, h) for part in "qkvo"}
            shapes |= {f"{at}mlp.{part}_proj.weight": (i, h) for part in ("gate", "up")}
            shapes |= {f"{at}mlp.down_proj.weight": (h, i)}
            shapes |= {f"{at}{part}_layernorm.weight": (h,) for part in ("input", "post_attention")}
        return shapes | {"model.norm.weight": (h,), "lm_head.weight": (self.vocabulary, h)}

    @property
    def parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes().values())

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": self.hidden // 64,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }


def write_models(folder: Path, llama: Llama, models: int, shard_bytes: int) -> list[Path]:
    """Write a base and `models` models that were tuned from it, in shards; return their folders, the base first.

    Base weights are N(0, 0.02²), deltas heavy-tailed of about a tenth of that (a normal times the size of another one,
    as of training that moves few weights much), all rounded to bfloat16.
    """
    g = torch.Generator().manual_seed(0)
    base = torch.randn(POOL, generator=g) * 0.02
    folders: list[Path] = []
    for k in range(models + 1):
        tuned = torch.randn(POOL, generator=g) * torch.randn(POOL, generator=g).abs() * 0.002 if k else 0
        folders.append(folder / (f"model{k}" if k else "base"))
        _write(folders[-1], llama, (base + tuned).bfloat16(), shard_bytes)
    return folders


def _write(folder: Path, llama: Llama, pool: Tensor, shard_bytes: int) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(llama.config(), indent=2))
    twice = torch.cat([pool, pool]).view(torch.uint8).numpy().data
    shards = [*_shards(llama, shard_bytes)]
    where: dict[str, str] = {}
    start = 0
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        where |= dict.fromkeys(names, file)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, size in names.items():
            header[name] = {"dtype": "BF16", "shape": llama.shapes()[name], "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for size in names.values():
                start = (start + 7919 * 2) % (2 * POOL)  # so that no two tensors are alike
                for begin in range(0, size, 2 * POOL):
                    out.write(twice[start : start + min(2 * POOL, size - begin)])
    if len(shards) > 1:
        index = {"metadata": {"total_size": 2 * llama.parameters}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(llama: Llama, shard_bytes: int) -> Iterator[dict[str, int]]:
    """Give the tensors of each file with their bytes."""
    names: dict[str, int] = {}
    for name, shape in llama.shapes().items():
        size = 2 * torch.Size(shape).numel()
        if names and sum(names.values()) + size > shard_bytes:
            yield names
            names = {}
        names[name] = size
    yield names
