"""Merges PEFT adapters as products of their factors, with any ranks and scales.

Combine methods need models with the same tensors and one scale. So each adapter is passed to them as if it had the
first one's scale, with s_k/s_own multiplied into B, and all modules: one that it does not adapt has ΔW = 0, as factors
of zeros.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dimat.errors import ConfigError, DataError, MergeError
from dimat.merge.lora.factors import FactorPair, find_pairs, merged_rank
from dimat.merge.registry import product_methods
from dimat.merge.stages import Weights
from dimat.merge.weight_views import WeightsView
from dimat.merge_files.files import ADAPTER_CONFIG, ModelFiles, check_alike, tell_differences
from dimat.merge_files.peft import Settings, module_of, read_settings
from dimat.merge_files.recipe import Recipe, TensorGroup
from dimat.weights.header import TensorInfo

BIAS = re.compile(r"(?P<module>.+)\.lora_B(?:\.default)?\.bias")
"""The bias of B, which an adapter adds times its scale."""


@dataclass(frozen=True)
class Adapter:
    """An adapter with its factors, biases of B, and other tensors, by names that are the same in all adapters."""

    model: ModelFiles
    settings: Settings
    pairs: Mapping[str, FactorPair]
    biases: Mapping[str, str]
    others: tuple[str, ...]

    def rank(self, key: str) -> int:
        return self.model.infos[self.pairs[key].a].shape[0] if key in self.pairs else 0


@dataclass(frozen=True)
class MergedAdapter:
    """Adapters that fit together. `settings`: the first one's; `others`: those of the others with a weight; `pairs`,
    `biases`, `ranks`: of the merged adapter by module; `infos`: its tensors; `views`: the input of combine methods, the
    first adapter's first."""

    settings: Settings
    others: tuple[Settings, ...]
    pairs: Mapping[str, FactorPair]
    biases: Mapping[str, str]
    ranks: Mapping[str, int]
    infos: dict[str, TensorInfo]
    views: tuple[Weights, ...]

    def scale(self, key: str) -> float:
        """Return the scale of a module's merged factors."""
        return self.settings.scale_of(module_of(key), self.ranks[key])

    def config(self) -> bytes:
        """Return the merged adapter's adapter_config.json."""
        ranks = {module_of(key): rank for key, rank in self.ranks.items()}
        return self.settings.merged(ranks, self.others)


def open_adapters(recipe: Recipe, models: Sequence[ModelFiles]) -> tuple[Adapter, ...] | None:
    """Return the adapters of a recipe that merges products, checked; None if it merges tensors one by one.

    Raises ConfigError if some of the models are adapters and some are not, DataError for adapters that are damaged, are
    not plain LoRA, or do not fit together.
    """
    products = any(recipe.method_of(rule).traits["lora_products"] for rule in (None, *recipe.rules))
    if not (products or recipe.into_base) or not any(model.adapter for model in models):
        return None
    for model in models:
        if not model.adapter:
            raise ConfigError(f"{model.path} is not a PEFT adapter folder, but the other models are")
    adapters = tuple(_open(model, recipe.regex_s) for model in models)
    _check_fit(adapters)
    apart = {name for adapter in adapters for pair in adapter.pairs.values() for name in (pair.a, pair.b)}
    apart |= {name for adapter in adapters for name in adapter.biases.values()}
    check_alike(models, apart)
    return adapters


def names_of(recipe: Recipe, adapters: Sequence[Adapter]) -> dict[str, TensorInfo]:
    """Return the tensors of all adapters with a weight, by their name in the first adapter that has them."""
    mixings = [recipe.mixing_of(rule) for rule in (None, *recipe.rules)]
    found: dict[str, TensorInfo] = {}
    known: set[str] = set()
    for k, adapter in enumerate(adapters):
        if not any(mixing[k] for mixing in mixings):
            continue
        fresh = {name for key, pair in adapter.pairs.items() if key not in known for name in (pair.a, pair.b)}
        fresh |= {name for key, name in adapter.biases.items() if key + ".bias" not in known}
        known |= adapter.pairs.keys() | {key + ".bias" for key in adapter.biases}
        fresh |= set(adapter.others)
        found |= {name: info for name, info in adapter.model.infos.items() if name in fresh and name not in found}
    return found


def fit_together(
    adapters: tuple[Adapter, ...], names: Mapping[str, TensorInfo], parts: Sequence[TensorGroup], device: torch.device
) -> MergedAdapter:
    """Return adapters as one merge: the merged ranks, and each adapter in the first one's scale with all modules.

    Raises ConfigError for rules that separate factors or merge them one by one, and ranks that the adapters do not
    have.
    """
    pairs = {pair.key: pair for pair in find_pairs(names)}
    biases = {match["module"]: name for name in names if (match := BIAS.fullmatch(name))}
    shown: dict[str, list[int]] = {}  # ranks in which the adapters are shown
    ranks: dict[str, int] = {}
    for part in parts:
        inside = _pairs_inside(part, pairs)
        for key in inside:
            shown[key], ranks[key] = _ranks(part, [adapter.rank(key) for adapter in adapters], key)
        rank = part.method.options.get("rank")
        if inside and isinstance(rank, int) and all(ranks[key] < rank for key in inside):
            raise ConfigError(
                f"option rank = {rank} is more than the {max(ranks[key] for key in inside)} that the adapters have "
                "together; lora-concat keeps them all"
            )
    infos = dict(names)
    for key, pair in pairs.items():
        a, b, rank = names[pair.a], names[pair.b], ranks[key]
        infos[pair.a] = replace(a, shape=(rank, *a.shape[1:]))
        infos[pair.b] = replace(b, shape=(b.shape[0], rank, *b.shape[2:]))
    heard = [any(part.mixing[k] for part in parts) for k in range(len(adapters))]
    others = tuple(adapter.settings for adapter, counts in zip(adapters[1:], heard[1:]) if counts)
    merged = MergedAdapter(adapters[0].settings, others, pairs, biases, ranks, infos, ())
    views = tuple(AdapterView(adapter, merged, shown, k, device) for k, adapter in enumerate(adapters))
    return replace(merged, views=views)


class AdapterView(WeightsView):
    """An adapter with the names and the scale of a merged one."""

    def __init__(
        self,
        adapter: Adapter,
        merged: MergedAdapter,
        shown: Mapping[str, Sequence[int]],
        index: int,
        device: torch.device,
    ) -> None:
        super().__init__(dict.fromkeys(merged.infos))
        self._model = adapter.model
        self._device = device
        self._stored = {name: name for name in adapter.others}
        self._ratios: dict[str, float] = {}
        self._zeros: dict[str, TensorInfo] = {}
        for key, pair in merged.pairs.items():
            mine = adapter.pairs.get(key)
            if mine is None:
                rank, a, b = shown[key][index], merged.infos[pair.a], merged.infos[pair.b]
                self._zeros[pair.a] = replace(a, shape=(rank, *a.shape[1:]))
                self._zeros[pair.b] = replace(b, shape=(b.shape[0], rank, *b.shape[2:]))
            else:
                self._stored |= {pair.a: mine.a, pair.b: mine.b}
                self._ratios[pair.b] = adapter.settings.scale_of(module_of(key), adapter.rank(key)) / merged.scale(key)
        for key, name in merged.biases.items():
            if key in adapter.biases:
                self._stored[name] = adapter.biases[key]
                self._ratios[name] = self._ratios[merged.pairs[key].b]
            else:
                self._zeros[name] = merged.infos[name]

    def __getitem__(self, name: str) -> Tensor:
        if name in self._zeros:
            info = self._zeros[name]
            return torch.zeros(info.shape, dtype=info.dtype)
        tensor = self._model[self._stored[name]]
        ratio = self._ratios.get(name, 1.0)
        if ratio == 1:
            return tensor
        return tensor.to(torch.float32 if self._device.type == "mps" else torch.float64) * ratio


def _open(model: ModelFiles, regex_s: float) -> Adapter:
    settings = read_settings(model.path, regex_s)
    try:
        pairs = {pair.key: pair for pair in find_pairs(model.infos)}
    except MergeError as error:
        raise DataError(f"{model.path}: {error}") from None
    if not pairs:
        raise DataError(f"{model.path} has no LoRA factors (lora_A, lora_B)")
    biases = {match["module"]: name for name in model.infos if (match := BIAS.fullmatch(name))}
    known = {name for pair in pairs.values() for name in (pair.a, pair.b)} | {*biases.values()}
    others = tuple(name for name in model.infos if name not in known)
    for name in others:
        if re.search(r"(^|\.)lora_", name):
            raise DataError(f"{model.path}: tensor {name!r} is not of plain LoRA; merge it into its base model first")
    for key, name in biases.items():
        if key not in pairs:
            raise DataError(f"{model.path}: tensor {name!r} is a bias of factors that are missing")
    for key, pair in pairs.items():
        a, b, rank = model.infos[pair.a], model.infos[pair.b], settings.rank_of(module_of(key))
        if key.endswith("]"):
            raise DataError(f"{model.path}: tensor {pair.a!r} is of a named adapter; save it alone with PEFT")
        for name, info in ((pair.a, a), (pair.b, b)):
            if not info.dtype.is_floating_point or len(info.shape) < 2:
                raise DataError(f"{model.path}: {name!r} is {info}, which is not a LoRA factor")
        if b.shape[1] != a.shape[0] or any(size != 1 for size in b.shape[2:]):
            raise DataError(f"{model.path}: {pair.a!r} {a} and {pair.b!r} {b} have no product B·A")
        if a.shape[0] != rank:
            raise DataError(f"{settings.path / ADAPTER_CONFIG}: the rank of {key!r} is {rank}, but its lora_A is {a}")
    return Adapter(model, settings, pairs, biases, others)


def _check_fit(adapters: Sequence[Adapter]) -> None:
    """Check that the products of a module's factors have the same shape in all adapters."""
    first: dict[str, Adapter] = {}
    found: list[str] = []
    for adapter in adapters:
        for key, mine in adapter.pairs.items():
            other = first.setdefault(key, adapter)
            for name, theirs, free in ((mine.a, other.pairs[key].a, 0), (mine.b, other.pairs[key].b, 1)):
                one, two = other.model.infos[theirs], adapter.model.infos[name]
                if [*one.shape[:free], *one.shape[free + 1 :]] != [*two.shape[:free], *two.shape[free + 1 :]]:
                    found.append(f"{name!r} is {one} in {other.model.path}, {two} in {adapter.model.path}")
            if mine.embedding != other.pairs[key].embedding:
                found.append(f"{key!r} is an embedding in one of {other.model.path} and {adapter.model.path}")
    tell_differences(found)


def _pairs_inside(part: TensorGroup, pairs: Mapping[str, FactorPair]) -> list[str]:
    """Return the modules whose factors a method merges; ConfigError if it gets one of two, or cannot merge them."""
    names = {*part.names}
    inside = [key for key, pair in pairs.items() if pair.a in names or pair.b in names]
    for key in inside:
        if not {pairs[key].a, pairs[key].b} <= names:
            raise ConfigError(f"a rule separates the factors of {key!r}: match both, e.g. {key + '.lora_*'!r}")
        if not part.method.traits["lora_products"]:
            raise ConfigError(
                f"method {part.method.name!r} would merge the factors of {key!r} one by one, beside others whose "
                f"products are merged: take one of {', '.join(product_methods())}"
            )
    return inside


def _ranks(part: TensorGroup, ranks: Sequence[int], key: str) -> tuple[list[int], int]:
    """Return the ranks in which the adapters are passed to the method, and the merged rank."""
    shown = [*ranks]
    rank = part.method.options.get("rank")
    taking_part = [rank for rank, weight in zip(ranks, part.mixing) if weight]
    if not any(taking_part):
        raise ConfigError(f"no model that has {key!r} has a weight; give one to it, or leave the model out")
    if part.method.traits["adds_ranks"]:
        return shown, sum(taking_part)
    if rank is None and not shown[0]:
        shown[0] = max(taking_part)  # own has room for what others have
    return shown, merged_rank(rank, shown[0], [rank for rank, weight in zip(shown, part.mixing) if weight])
