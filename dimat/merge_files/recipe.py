"""The recipe of a merge of files: models, methods, output; from TOML or flags."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isclose
from pathlib import Path
from typing import Annotated, Any, cast

import regex
import torch
from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from dimat.config.load import build, parse_value, read_toml
from dimat.config.tree import Named, NamedConfig, Options, Tree
from dimat.errors import ConfigError, nearest
from dimat.merge.registry import align_registry, combine_registry, repair_registry
from dimat.merge.stages import Weights
from dimat.reading import REGEX_S, matches
from dimat.registry import Bound

DTYPES: Mapping[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""Types in which floating-point tensors may be written."""

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SUM_TOLERANCE = 1e-6


def _known_dtype(name: str | None) -> str | None:
    if name is not None and name not in DTYPES:
        raise ValueError(f"unknown type{nearest(name, DTYPES)} (known: {', '.join(DTYPES)})")
    return name


def as_bytes(value: Any) -> Any:
    """Return a number of bytes: 5000000, "5 GB", "512MiB"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value) if isinstance(value, str) else None
    if found is None:
        return value
    if found[2].upper() not in UNITS:
        raise ValueError(f"unknown unit {found[2]!r} (known: KB, MB, GB, KiB, MiB, GiB)")
    return int(float(found[1]) * UNITS[found[2].upper()])


class ModelEntry(Tree):
    """One model to merge."""

    path: str
    """Safetensors file, index of shards, or folder."""
    weight: float | None = None
    """Mixing weight; either all models have one, or none does (then all are equal)."""
    statistics: str | None = None
    """Safetensors file of statistics for "fisher" and "regmean": `fisher.<tensor>`, `gram.<tensor>`."""


class Rule(Tree):
    """The merge of tensors whose name matches; the first rule that matches a tensor counts."""

    match: str | None = None
    """Pattern of the whole name: `*`, `?`, `[…]`."""
    regex: str | None = None
    """Regular expression searched for in the name; instead of `match`."""
    method: str | None = None
    """Combine method; the recipe's if left out."""
    options: Options = Field(default_factory=dict)
    """Options of the method; without `method` in the rule, they override the recipe's."""
    weights: tuple[float, ...] | None = None
    """Mixing weights; the recipe's if left out."""

    @model_validator(mode="after")
    def _one_pattern(self) -> Rule:
        if (self.match is None) == (self.regex is None):
            raise ValueError("a rule has either match (a pattern like *.bias) or regex")
        if self.regex is not None:
            try:
                regex.compile(self.regex)
            except regex.error as error:
                raise ValueError(f"regex {self.regex!r}: {error}") from None
        return self

    def fits(self, name: str, limit_s: float) -> bool:
        """Tell whether a tensor's name matches; ConfigError if the regular expression takes longer than a limit."""
        if self.match is not None:
            return fnmatchcase(name, self.match)
        try:
            return matches(self.regex or "", name, limit_s)
        except TimeoutError:
            raise ConfigError(
                f"regex {self.regex!r} takes more than regex_s = {limit_s:g} s for {name!r}: write it without nested "
                "repeats, or raise regex_s"
            ) from None

    @property
    def pattern(self) -> str:
        return self.match or self.regex or ""


class Recipe(Tree):
    """A merge of model files."""

    models: tuple[ModelEntry, ...] = Field(min_length=1)
    """The models; the first one determines names, types and integer tensors."""
    base: str | None = None
    """Base model from which deltas are taken, for methods that merge deltas; or into which adapters are merged."""
    into_base: bool = False
    """Merge PEFT adapters into the base: the result is a full model, W + ΔW (method: lora-concat if left out)."""
    method: str = "average"
    """Combine method."""
    options: Options = Field(default_factory=dict)
    """Options of the method."""
    rules: tuple[Rule, ...] = ()
    """Other methods, weights or options for some tensors."""
    model: str | None = None
    """Architecture of the models, for merges that run them: `module:function` or `file.py:function` that returns a
    torch module or a task, or the name of a bundled task."""
    data: str | None = None
    """Inputs to run the models on: a safetensors file of examples stacked along the first axis (one tensor, or the
    model's arguments in the order of their names, e.g. input.0, input.1), a hook that returns a tensor of them or
    batches, or a task, whose probe set is used."""
    align: Named = NamedConfig(name="none")
    """How the other models' units are brought into the first one's order before the merge: "none", "activations",
    "weights" or "auto"."""
    repair: Named = NamedConfig(name="none")
    """Statistics to re-estimate on the data afterwards: "none" or "batchnorm"."""
    align_vocabulary: bool = False
    """Bring the rows of embeddings into the token order of the model whose tokenizer is written: the base, else the
    first one. The tokens must be the same."""
    out: str | None = None
    """Path of the merged model: a name in .safetensors, or a folder."""
    dtype: Annotated[str | None, AfterValidator(_known_dtype)] = None
    """Type of the merged model's floating-point tensors; by default that in which the first model's tensor is read."""
    input_dtype: Annotated[str | None, AfterValidator(_known_dtype)] = None
    """Type to which the models' and the base's floating-point tensors are rounded when read; by default each tensor's
    own. Sums use a wider type than either."""
    device: str = "cpu"
    """Device on which tensors are merged: cpu, cuda, cuda:1, auto."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed for methods with random draws."""
    shard_size: Annotated[int, BeforeValidator(as_bytes), Field(ge=1)] = 5 * 10**9
    """Bytes per file of a folder, e.g. "5GB"."""
    keep_not_finite: bool = False
    """Write a merge even if some of its numbers are not finite; by default the merge ends at the first of them, and
    nothing is written. Inputs must be finite in any case."""
    regex_s: Annotated[float, Field(gt=0)] = REGEX_S
    """Seconds that a regular expression, of a rule or of an adapter, may take for one name."""
    folder: str = "."
    """The recipe's own folder, in which hooks are looked up; cannot be set in the file."""

    @field_validator("models", mode="before")
    @classmethod
    def _paths_alone(cls, value: Any) -> Any:
        """Accept models that are given only as paths."""
        if not isinstance(value, list):
            return value
        return [{"path": entry} if isinstance(entry, str) else entry for entry in cast("list[Any]", value)]

    @property
    def mixing(self) -> list[float]:
        """Mixing weights, in the order of the models."""
        given = [model.weight for model in self.models]
        weights = [weight for weight in given if weight is not None]
        if not weights:
            return [1 / len(given)] * len(given)
        if len(weights) < len(given):
            raise ConfigError(f"model {given.index(None) + 1} has no weight: give every model one, or none of them")
        return checked_mixing(weights, len(given))

    def method_of(self, rule: Rule | None) -> Bound[Weights]:
        """Return the method, with its options, for a rule's tensors, or for those that no rule matches."""
        if rule is None:
            return combine_registry.bind(self.method, self.options)
        if rule.method is None:
            return combine_registry.bind(self.method, {**self.options, **rule.options})
        return combine_registry.bind(rule.method, rule.options)

    def mixing_of(self, rule: Rule | None) -> list[float]:
        """Return the mixing weights for a rule's tensors, or for those that no rule matches."""
        if rule is None or rule.weights is None:
            return self.mixing
        return checked_mixing(rule.weights, len(self.models))


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that are merged in the same way."""

    names: tuple[str, ...]
    method: Bound[Weights]
    mixing: list[float]


def checked_mixing(weights: Sequence[float], models: int) -> list[float]:
    """Return mixing weights; ConfigError unless there is one for each model, none negative, and they sum to 1."""
    if len(weights) != models:
        raise ConfigError(f"{len(weights)} weights for {models} models: give one each, own (the first model) first")
    if not all(0 <= w <= 1 + SUM_TOLERANCE for w in weights) or not isclose(sum(weights), 1, abs_tol=SUM_TOLERANCE):
        raise ConfigError(
            f"weights must not be negative and must sum to 1, got {', '.join(f'{w:g}' for w in weights)}; "
            "coefficients of any sum are the option weights of methods that merge deltas: --set weights=[1.0,-0.5]"
        )
    return [*weights]


PATHS = ("path", "statistics")
"""Keys of a model that are paths, relative to the recipe's folder."""


def load_recipe(file: Path, changes: Mapping[str, Any], options: Mapping[str, Any]) -> Recipe:
    """Read a recipe from TOML; paths in it are relative to its folder. `changes` replace its keys, `options` override
    its options. ConfigError describes faults in it."""
    tree = read_toml(file)
    if "folder" in tree:
        raise ConfigError(f"unknown key 'folder' in {file}: it is the file's own folder")
    tree["folder"] = str(file.parent)
    data = str(tree.get("data", ""))
    beside = data.endswith(".safetensors") or (":" not in data and (file.parent / data).exists())  # else a hook, a task
    for key in ("base", "out", *(["data"] if beside else [])):
        if isinstance(tree.get(key), str):
            tree[key] = str(file.parent / tree[key])
    for i, model in enumerate(tree.get("models", []) if isinstance(tree.get("models"), list) else []):
        entry = {"path": model} if isinstance(model, str) else model
        if isinstance(entry, dict):
            paths = {k: str(file.parent / v) for k, v in entry.items() if k in PATHS and isinstance(v, str)}
            tree["models"][i] = {**entry, **paths}
    return build_recipe(tree, changes, options, str(file))


def build_recipe(tree: Mapping[str, Any], changes: Mapping[str, Any], options: Mapping[str, Any], where: str) -> Recipe:
    """Return the recipe from a tree of plain values, overridden by `changes` and method `options`, all names
    checked."""
    changes = {key: value for key, value in changes.items() if value is not None}
    weights = changes.pop("weights", None)
    merged = {**tree, **changes}
    if "method" in changes and changes["method"] != tree.get("method", Recipe.model_fields["method"].default):
        merged["options"] = {}  # those of another method
    if options:
        merged["options"] = {**merged.get("options", {}), **options}
    if merged.get("into_base") and "method" not in merged:
        merged["method"] = "lora-concat"
    recipe = build(Recipe, merged, where)
    if weights is not None:
        checked_mixing(weights, len(recipe.models))
        models = tuple(m.model_copy(update={"weight": w}) for m, w in zip(recipe.models, weights))
        recipe = recipe.model_copy(update={"models": models})
    for rule in (None, *recipe.rules):
        recipe.method_of(rule)
        recipe.mixing_of(rule)
    align_registry.check(recipe.align.name, recipe.align.options)
    repair_registry.check(recipe.repair.name, recipe.repair.options)
    return recipe


def parse_options(items: Sequence[str]) -> dict[str, Any]:
    """Return method options from KEY=VALUE items; values are TOML, or else plain text."""
    options: dict[str, Any] = {}
    for item in items:
        key, sign, text = item.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"--set {item!r}: expected OPTION=VALUE, e.g. --set density=0.5")
        options[key.strip()] = parse_value(text.strip(), f"--set {key.strip()}")
    return options


def parse_weights(text: str | None) -> list[float] | None:
    """Return mixing weights from 0.5,0.3,0.2."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights {text!r}: expected numbers, e.g. --weights 0.5,0.3,0.2") from None


def recipe_of(
    inputs: Sequence[Path],
    changes: Mapping[str, Any],
    options: Sequence[str] = (),
    yaml: Path | None = None,
) -> Recipe:
    """Return the recipe of a command: a TOML file, mergekit's YAML, or models by name, overridden by flags.

    `changes`: keys of the recipe by flag, None if a flag is not given, and `weights`; `options`: KEY=VALUE items.
    """
    chosen = parse_options(options)
    if yaml is not None:
        if inputs:
            raise ConfigError("--from-mergekit names its models itself; leave out INPUTS")
        from dimat.merge_files.mergekit import from_mergekit

        return build_recipe(from_mergekit(yaml), changes, chosen, str(yaml))
    if not inputs:
        raise ConfigError("merge needs a recipe (TOML) or models: dimat merge a.safetensors b/ -o out/ (see --help)")
    recipes = [path for path in inputs if path.suffix == ".toml"]
    if recipes:
        if len(inputs) > 1:
            raise ConfigError(f"{recipes[0]} is a recipe, which names its models itself; leave out the other inputs")
        return load_recipe(recipes[0], changes, chosen)
    return build_recipe({"models": [str(path) for path in inputs]}, changes, chosen, "the command line")
