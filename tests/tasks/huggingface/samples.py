"""Small data and models, written by the test that needs them; nothing is fetched."""

from __future__ import annotations

import random
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

for _package in ("transformers", "datasets", "peft"):  # not imported: `dimat.tasks.huggingface.library` does it right
    if find_spec(_package) is None:
        pytest.skip(f"{_package} is not installed", allow_module_level=True)

VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 12,
    "patch_size": 4,
}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}
CONVNEXT = {
    "model_type": "convnext",
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "num_stages": 2,
    "patch_size": 2,
    "image_size": 12,
}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def grouped(defaults: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a task's options with changes put into their groups; a value that is no group replaces what was there."""
    tree = dict(defaults)
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return tree


def picture(label: int, generator: np.random.Generator, size: int = 12) -> np.ndarray[Any, Any]:
    """Return noise that is brighter in channel `label`, (size, size, 3) uint8."""
    pixels = generator.integers(0, 120, (size, size, 3), dtype=np.uint8)
    pixels[:, :, label] += np.uint8(80)
    return pixels


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_parquet(file: Path, samples: int = 120, *, seed: int = 0, **columns: Any) -> np.ndarray[Any, Any]:
    """Write pictures of three classes in turn, and return their pixels, (N, H, W, 3)."""
    import pyarrow as pa
    from pyarrow import parquet

    generator = np.random.default_rng(seed)
    pixels = np.stack([picture(i % 3, generator) for i in range(samples)])
    images = [{"bytes": png(image), "path": None} for image in pixels]
    table = columns or {"image": images, "label": [i % 3 for i in range(samples)]}
    parquet.write_table(pa.table({"image": images, **table}), file)
    return pixels


def write_class_folders(folder: Path, samples: int = 10) -> None:
    """Write PNG files as train/<class>/<n>.png and test/<class>/<n>.png."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(("blue", "green", "red")):
            inside = folder / split / name
            inside.mkdir(parents=True)
            for i in range(samples):
                (inside / f"{i}.png").write_bytes(png(picture(label, generator)))


def sentences(documents: int, seed: int = 0) -> list[str]:
    """Return texts of a small grammar."""
    draw = random.Random(seed)

    def one() -> str:
        return (
            f"the {draw.choice(['red', 'old', 'small'])} {draw.choice(['cat', 'dog', 'fox'])} "
            f"{draw.choice(['sees', 'hears'])} the {draw.choice(['bird', 'mouse'])}."
        )

    return [" ".join(one() for _ in range(3)) for _ in range(documents)]


def write_text(file: Path, documents: int = 120) -> list[str]:
    texts = sentences(documents)
    file.write_text("\n\n".join(texts), encoding="utf-8")
    return texts


def write_tokenizer(folder: Path, texts: list[str]) -> Any:
    """Train a byte-pair tokenizer of at most 120 tokens and save it as transformers does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from dimat.tasks.huggingface.library import library

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "</s>"]))
    fast = library("transformers").PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(folder)
    return fast


def write_byte_pairs(folder: Path, texts: list[str], size: int = 300) -> Any:
    """Train a byte-level tokenizer as GPT-2's, of any text and with the spaces in its tokens, and save it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from dimat.tasks.huggingface.library import library

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["</s>"], initial_alphabet=alphabet)
    made.train_from_iterator(texts, trainer)
    fast = library("transformers").PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    fast.save_pretrained(folder)
    return fast
