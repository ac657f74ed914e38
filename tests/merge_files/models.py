"""Models on disk for the tests of merging: single files, shards, folders, adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A model with tensors of several kinds; models of all seeds are near each other."""
    base, own = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (20, 8), "layers.0.mlp.weight": (16, 8), "layers.0.mlp.bias": (16,), "norm.weight": (8,)}
    drawn = {
        name: (torch.randn(shape, generator=base) + 0.1 * torch.randn(shape, generator=own)).to(dtype)
        for name, shape in shapes.items()
    }
    return {**drawn, "scale": torch.tensor(1.0 + seed, dtype=dtype), "steps": torch.tensor([seed, 7])}


def write_folder(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1, config: str = "llama") -> Path:
    """Write a folder as Hugging Face's libraries do."""
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "_name_or_path": config, "torch_dtype": "float32"})
    )
    (folder / "tokenizer.json").write_text(f'{{"of": "{config}"}}')
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    where: dict[str, str] = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[i::shards]}
        save_file(part, folder / name)
        where |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def read_model(path: Path) -> dict[str, Tensor]:
    """Read a merged model with safetensors' own reader."""
    if path.is_file():
        return load_file(path)
    index = path / "model.safetensors.index.json"
    if index.exists():
        where: dict[str, str] = json.loads(index.read_text())["weight_map"]
        loaded = {file: load_file(path / file) for file in set(where.values())}
        assert sum(map(len, loaded.values())) == len(where)
        return {name: loaded[file][name] for name, file in where.items()}
    (file,) = path.glob("*.safetensors")
    return load_file(file)


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()
