"""PEFT adapter folders for the tests of merging, written by hand as PEFT's save_pretrained writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PREFIX = "base_model.model."

LAYERS = {"model.layers.0.q_proj": (12, 10), "model.layers.0.v_proj": (6, 10), "model.layers.1.q_proj": (12, 10)}
"""Linear layers of a base model: name → (out, in)."""

CONFIG: dict[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "org/base",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "rank_pattern": {},
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}


def factors(
    seed: int,
    rank: int = 4,
    layers: Mapping[str, tuple[int, int]] = LAYERS,
    ranks: Mapping[str, int] = {},
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Random factors of linear layers, by PEFT's names."""
    g = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name, (rows, columns) in layers.items():
        r = ranks.get(name, rank)
        found[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(r, columns, generator=g).to(dtype)
        found[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(rows, r, generator=g).to(dtype)
    return found


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """Write an adapter folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}, indent=2))
    return folder


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an adapter folder: tensors, and its config."""
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())


def delta(tensors: Mapping[str, Tensor], config: Mapping[str, Any], layer: str) -> Tensor:
    """Return ΔW = s·B·A of a linear layer as PEFT computes it, from the written settings; zeros where it has none."""
    name = PREFIX + layer
    if f"{name}.lora_A.weight" not in tensors:
        return torch.zeros(LAYERS[layer], dtype=torch.float64)
    a, b = (tensors[f"{name}.lora_{side}.weight"].double() for side in "AB")
    rank = config["rank_pattern"].get(layer, config["r"])
    alpha = config["alpha_pattern"].get(layer, config["lora_alpha"])
    assert a.shape[0] == b.shape[1] == rank
    return (alpha / (rank**0.5 if config["use_rslora"] else rank)) * b @ a
