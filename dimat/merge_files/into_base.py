"""Adds a merged adapter to its base model's weights, W + s·B·A, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dimat.errors import ConfigError, DataError
from dimat.merge.lora.factors import FactorPair
from dimat.merge_files.adapters import MergedAdapter
from dimat.merge_files.files import ADAPTER_CONFIG, ModelFiles
from dimat.merge_files.memory import PROCESS
from dimat.merge_files.peft import module_of
from dimat.merge_files.recipe import Recipe
from dimat.merge_files.write import is_file_name
from dimat.weights.header import TensorInfo


@dataclass(frozen=True)
class IntoBase:
    """Which of the base's tensors a merged adapter changes. `products`: pair, scale and whether the product is
    transposed; `biases`: the bias of B and its scale; `replaced`: the adapter's tensor that replaces the base's
    (modules that were trained in full)."""

    base: ModelFiles
    products: Mapping[str, tuple[FactorPair, float, bool]]
    biases: Mapping[str, tuple[str, float]]
    replaced: Mapping[str, str]

    def tensor(self, name: str, merged: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """Return one of the base's tensors plus the adapter's change, if there is one."""
        whole = merged[self.replaced[name]] if name in self.replaced else self.base[name]
        if name not in self.products and name not in self.biases:
            return whole
        wide = whole.to(device, torch.float32 if device.type == "mps" else torch.float64, copy=True).contiguous()
        if name in self.products:
            pair, scale, transposed = self.products[name]
            a, b = merged[pair.a].to(wide).flatten(1), merged[pair.b].to(wide).flatten(1)
            left, right = (a.mT, b.mT) if transposed else (b, a)
            wide.view(wide.shape[0], -1).addmm_(left, right, alpha=scale)
        if name in self.biases:
            bias, scale = self.biases[name]
            wide.add_(merged[bias].to(wide), alpha=scale)
        return wide

    def peak_memory(self, merged: Mapping[str, TensorInfo]) -> int:
        """Return the approximate memory in bytes, besides mapped files: the merged adapter and the largest tensor."""
        largest = max((info.elements for info in self.base.infos.values()), default=0)
        return PROCESS + sum(info.elements * 8 for info in merged.values()) + 2 * 8 * largest


def target(recipe: Recipe, merged: MergedAdapter | None, base: ModelFiles | None, out: Path) -> IntoBase | None:
    """Return the plan by which a recipe merges adapters into its base; None if it does not.

    Raises ConfigError for an output, base or models that do not fit the recipe, DataError if the base lacks a tensor
    that the adapters change.
    """
    if recipe.into_base:
        if merged is None:
            raise ConfigError("into_base (--into-base) merges PEFT adapter folders, and these models are not")
        if base is None or base.adapter:
            raise ConfigError("into what? into_base (--into-base) needs the adapters' base model: give it with --base")
        return _into(merged, base)
    if merged is not None and base is not None:
        raise ConfigError(
            "methods that merge adapters' products take no base: leave out --base, or merge into it with --into-base"
        )
    if merged is not None and is_file_name(out):
        raise ConfigError(f"{out}: a merged adapter is a folder, as its rank and scale are in {ADAPTER_CONFIG}")
    return None


def _into(merged: MergedAdapter, base: ModelFiles) -> IntoBase:
    products: dict[str, tuple[FactorPair, float, bool]] = {}
    biases: dict[str, tuple[str, float]] = {}
    replaced: dict[str, str] = {}
    for key, pair in merged.pairs.items():
        name = _named(key, "weight")
        products[name] = (pair, merged.scale(key), _transposed(merged, base, pair, name))
    for key, bias in merged.biases.items():
        biases[_found(base, _named(key, "bias"), bias, merged.infos[bias].shape)] = (bias, merged.scale(key))
    known = {name for pair in merged.pairs.values() for name in (pair.a, pair.b)} | {*merged.biases.values()}
    for name, info in merged.infos.items():
        if name not in known:
            place = module_of(name).replace(".base_layer.", ".")
            replaced[_found(base, place, name, info.shape)] = name
    return IntoBase(base, products, biases, replaced)


def _named(key: str, what: str) -> str:
    module = module_of(key)
    return f"{module}.{what}" if module else what


def _transposed(merged: MergedAdapter, base: ModelFiles, pair: FactorPair, name: str) -> bool:
    """Tell whether a weight is (in, out), as in embeddings and some linear layers; from its shape, or from
    fan_in_fan_out if it is square."""
    a, b = merged.infos[pair.a].shape, merged.infos[pair.b].shape
    straight, turned = (b[0], *a[1:]), (*a[1:], b[0])
    info = base.infos.get(name)
    flag = pair.embedding or bool(merged.settings.config.get("fan_in_fan_out"))
    flipped = len(a) == 2 and (flag if info is None or straight == turned else info.shape == turned)
    _found(base, name, pair.b, turned if flipped or pair.embedding else straight)
    return flipped


def _found(base: ModelFiles, name: str, of: str, shape: tuple[int, ...]) -> str:
    info = base.infos.get(name)
    if info is None:
        raise DataError(
            f"the base {base.path} has no tensor {name!r}, which the adapters' {of!r} changes; its names are like "
            f"{next(iter(base.infos))!r}"
        )
    if info.shape != shape:
        raise DataError(f"the base {base.path} has {name!r} as {info}, the adapters' {of!r} needs {[*shape]}")
    if not info.dtype.is_floating_point:
        raise DataError(f"the base {base.path} has {name!r} as {info}, quantised: nothing can be added to it")
    return name
