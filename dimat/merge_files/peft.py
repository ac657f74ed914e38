"""A PEFT adapter's adapter_config.json: its ranks and scales, and the merged adapter's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, cast

import regex

from dimat.errors import DataError
from dimat.merge_files.files import ADAPTER_CONFIG
from dimat.reading import REGEX_S, matches, read_table

PREFIX = "base_model.model."
"""The prefix that PEFT puts before the name of every module."""

TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Keys that say which modules have factors."""

PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that do not change the base's weights. Others (PiSSA, OLoRA, LoftQ, …) move a part of the
base into the factors, so that the delta is not relative to the named base."""

UNFIT = {
    "use_dora": "is DoRA: its magnitudes scale the base's weights too",
    "use_qalora": "is QALoRA: its A sees pooled inputs",
    "use_bdlora": "is BD-LoRA: its factors are blocks of a diagonal",
    "kasa_config": "is KaSA: it changes the base's weights too",
    "monteclora_config": "is MonteCLoRA: its factors are drawn at random",
    "alora_invocation_tokens": "is aLoRA: it adds only to a part of the text",
    "layer_replication": "has a base whose layers are stacked anew",
    "target_parameters": "adapts single parameters: the factors of several experts are in one tensor",
    "trainable_token_indices": "trains the embeddings of single tokens",
}
"""Settings with which an adapter does not add ΔW = s·B·A, and why."""


@dataclass(frozen=True)
class Settings:
    """An adapter_config.json, checked. Ranks and alphas may differ from module to module by patterns of names."""

    path: Path
    config: Mapping[str, Any]
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    regex_s: float = REGEX_S

    def rank_of(self, module: str) -> int:
        """Return a module's rank."""
        return self.ranks.get(self._pattern(self.ranks, module), self.rank)

    def scale_of(self, module: str, rank: int) -> float:
        """Return the s of a module's ΔW = s·B·A at a rank: alpha / rank, or alpha / √rank (rsLoRA)."""
        alpha = self.alphas.get(self._pattern(self.alphas, module), self.alpha)
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    def _pattern(self, patterns: Mapping[str, Any], module: str) -> str:
        """Return the first of the patterns, regular expressions, that match the end of a module's name; else the
        name."""
        try:
            fit = (p for p in patterns if matches(rf"(.*\.)?({p})", module, self.regex_s, whole=True))
            return next(fit, module)
        except TimeoutError:
            raise DataError(
                f"{self.path / ADAPTER_CONFIG}: a pattern of ranks or alphas takes more than {self.regex_s:g} s for "
                f"{module!r}; name the modules one by one, or raise regex_s in the recipe"
            ) from None

    def merged(self, ranks: Mapping[str, int], others: Sequence[Settings]) -> bytes:
        """Return the adapter_config.json of a merged adapter with these ranks, by module.

        Everything except ranks is unchanged, including lora_alpha: the scale follows from the rank by `scale_of`. If
        adapters choose their modules differently, the merged ones are named one by one.
        """
        config = dict(self.config)
        if any(self.rank_of(module) != rank for module, rank in ranks.items()):
            counts = Counter(ranks.values())
            config["r"] = max(counts, key=lambda rank: (counts[rank], rank))
            apart = sorted((m for m, rank in ranks.items() if rank != config["r"]), key=lambda m: (-len(m), m))
            config["rank_pattern"] = {module: ranks[module] for module in apart}  # a name may end like a longer one
        if any(_targets(self.config, key) != _targets(o.config, key) for o in others for key in TARGETS):
            config |= {key: None for key in TARGETS if key in config} | {"target_modules": sorted(ranks)}
        return (json.dumps(config, indent=2) + "\n").encode()


def read_settings(folder: Path, regex_s: float = REGEX_S) -> Settings:
    """Read the settings of a PEFT folder; DataError if they are damaged, or the adapter is not plain LoRA. `regex_s`:
    seconds that one of its patterns may take for one module's name."""
    path = folder / ADAPTER_CONFIG
    config = read_table(path)
    if config.get("peft_type") != "LORA":
        raise DataError(f"{path}: peft_type is {config.get('peft_type')!r}; products are merged only for LORA adapters")
    for key, why in UNFIT.items():
        if config.get(key):
            raise DataError(f"{path}: {key} is set, the adapter {why}; merge it into its base model with PEFT first")
    start = config.get("init_lora_weights")
    if not any(start is plain or (isinstance(start, str) and start == plain) for plain in PLAIN_STARTS):
        raise DataError(
            f"{path}: init_lora_weights is {start!r}, which moves a part of the base into the factors; "
            "convert it to plain LoRA with PEFT first"
        )
    ranks, alphas = _table(path, config, "rank_pattern"), _table(path, config, "alpha_pattern")
    return Settings(
        folder,
        config,
        _rank(path, "r", config.get("r")),
        _alpha(path, "lora_alpha", config.get("lora_alpha")),
        {key: _rank(path, f"rank_pattern[{key!r}]", value) for key, value in ranks.items()},
        {key: _alpha(path, f"alpha_pattern[{key!r}]", value) for key, value in alphas.items()},
        regex_s,
    )


def module_of(name: str) -> str:
    """Return a module's name in the base model."""
    return name.removeprefix(PREFIX)


def _targets(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    return sorted(map(str, cast("list[Any]", value))) if isinstance(value, list) else value


def _table(path: Path, config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise DataError(f"{path}: {key} must be a table of modules, got {value!r}")
    table = cast("dict[str, Any]", value)
    for pattern in table:
        try:
            regex.compile(pattern)
        except regex.error as error:
            raise DataError(f"{path}: {key} has {pattern!r}, which is not a pattern: {error}") from None
    return table


def _rank(path: Path, key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise DataError(f"{path}: {key} must be a rank of at least 1, got {value!r}")
    return value


def _alpha(path: Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not isfinite(value) or value == 0:
        raise DataError(f"{path}: {key} must be a number other than 0, got {value!r}")
    return float(value)
