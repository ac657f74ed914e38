"""mergekit's YAML as a recipe, for the methods that both have.

Facts are from mergekit 0.1.5's documentation and golden runs.

A parameter is a value, a gradient over the layers (a list of numbers), or a list of such values with a filter (a part
of a tensor's name), of which the first that fits counts. Where there are gradients or filters, every tensor is looked
at by itself, and tensors with the same values make one rule of the recipe.

A configuration that would not give the same result is refused. DARE and DELLA draw other random numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from dimat.errors import ConfigError, unknown_name
from dimat.merge_files.files import ModelFiles, open_model

IGNORED = {"int8_mask"}
"""Parameters that change how mergekit computes, not what."""

LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
"""The number of a tensor's layer in its name."""

BEFORE = re.compile(r"(?:^|\.)(?:embed_tokens|tok_embeddings|word_embeddings|embed_in|wte|wpe)\.\w+$")
AFTER = re.compile(r"(?:^|\.)(?:norm|ln_f|final_layernorm|final_layer_norm|lm_head|embed_out)\.\w+$")
"""Tensors before the first layer and after the last one, where gradients have their first and last value."""


@dataclass(frozen=True)
class Place:
    """A tensor: its name, and how far on the way from the first layer (0) to the last (1) it lies, None if unknown."""

    name: str
    depth: float | None


class Config:
    """A mergekit configuration: global parameters, and those of each model that is merged."""

    def __init__(self, tree: Mapping[str, Any], where: str) -> None:
        self.where = where
        unknown = tree.keys() - {"merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "name"}
        unknown -= {"tokenizer_source"} if tree.get("tokenizer_source") in (None, "base") else set()
        if unknown:
            raise self.fault(f"{min(unknown)!r} of mergekit is not supported; write a dimat recipe instead")
        self.method = str(tree.get("merge_method", "linear"))
        self.base: str | None = None if tree.get("base_model") is None else str(tree["base_model"])
        self.common = self._table(tree.get("parameters"))
        models = tree.get("models")
        if not isinstance(models, list) or not models:
            raise self.fault("models must be a list of models")
        self.listed = [self._model(entry) for entry in cast("list[Any]", models)]
        self.used: set[str] = set()
        self.place: Place | None = None

    def fault(self, text: str) -> ConfigError:
        return ConfigError(f"{self.where}: {text}")

    @property
    def conditional(self) -> bool:
        """Tell whether a parameter depends on the tensor."""
        tables = [self.common, *(own for _, own in self.listed)]
        return any(isinstance(value, list | dict) for table in tables for value in table.values())

    def at(self, place: Place) -> Config:
        """Return the configuration of one tensor."""
        config = copy(self)
        config.place = place
        return config

    def value(self, key: str, default: Any, own: Mapping[str, Any] | None = None) -> Any:
        """Return a parameter: the model's own, else the common one, else the default."""
        for table in ([own] if own else []) + [self.common]:
            found = self._evaluated(key, table[key]) if key in table else None
            if found is not None:
                return found
        return default

    def _evaluated(self, key: str, setting: Any) -> Any:
        """Return the value of a setting for the tensor; None where it has none for it."""
        if not isinstance(setting, list | dict):
            return setting
        entries: list[Any] = cast("list[Any]", setting) if isinstance(setting, list) else [setting]
        if self.place is None or not entries:
            raise self.fault(f"{key} is an empty list" if not entries else f"{key} cannot differ between tensors")
        if all(isinstance(entry, int | float) and not isinstance(entry, bool) for entry in entries):
            return self._gradient(key, entries, self.place)
        for entry in entries:
            if not isinstance(entry, dict) or "value" not in entry or entry.keys() - {"filter", "value"}:
                raise self.fault(
                    f"{key}: a list is of numbers (a gradient), or of tables with value, and may have filter"
                )
            table = cast("dict[str, Any]", entry)
            part = table.get("filter")
            if part is None or part == "*" or str(part) in self.place.name:
                return self._evaluated(key, table["value"])
        return None

    def _gradient(self, key: str, values: Sequence[float], place: Place) -> float:
        if place.depth is None:
            if values[0] != values[-1]:
                raise self.fault(f"gradient of {key}: is {place.name!r} before the layers or after them?")
            return float(values[0])
        low = min(int(place.depth * (len(values) - 1)), max(len(values) - 2, 0))
        share = place.depth * (len(values) - 1) - low
        return (1 - share) * values[low] + share * values[min(low + 1, len(values) - 1)]

    def models(self) -> list[str]:
        """Return the models that are merged: the base is none of them."""
        found = [path for path, _ in self.listed if path != self.base]
        if not found:
            raise self.fault("no model is merged besides the base")
        return found

    def each(self, key: str, default: float | None) -> list[float]:
        """Return a number for each merged model."""
        self.used.add(key)
        found: list[float] = []
        for path, own in self.listed:
            if path == self.base and self.method not in ("linear", "slerp"):
                continue
            value = self.value(key, default, own)
            if isinstance(value, bool) or not isinstance(value, int | float):
                where = f" for {self.place.name}" if self.place is not None else ""
                raise self.fault(f"{key} of {path} {'is missing' if value is None else 'is no number'}{where}")
            found.append(float(value))
        return found

    def one(self, key: str, default: float) -> float:
        """Return a number that all merged models share."""
        values = set(self.each(key, default))
        if len(values) > 1:
            raise self.fault(f"models with {key} of their own are not supported; give all the same")
        return values.pop()

    def each_or_one(self, key: str, default: float) -> float | list[float]:
        """Return a number that all merged models share, or one for each."""
        values = self.each(key, default)
        return values[0] if len({*values}) == 1 else values

    def flag(self, key: str, default: bool) -> bool:
        """Return a global switch."""
        self.used.add(key)
        value = self.value(key, default)
        if not isinstance(value, bool):
            raise self.fault(f"{key} must be true or false")
        return value

    def check_used(self) -> None:
        """Raise where a parameter is given that nothing asked for, so that none is passed over."""
        given = {key for _, own in self.listed for key in own} | self.common.keys()
        left = given - self.used - IGNORED
        if left:
            raise self.fault(f"parameter {min(left)!r} of {self.method} is not supported")

    def _table(self, value: Any) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.fault("parameters must be a table")
        return cast("dict[str, Any]", value)

    def _model(self, entry: Any) -> tuple[str, dict[str, Any]]:
        if not isinstance(entry, dict) or "model" not in entry or entry.keys() - {"model", "parameters"}:
            raise self.fault("every entry of models has model, and may have parameters")
        table = cast("dict[str, Any]", entry)
        return str(table["model"]), self._table(table.get("parameters"))


Choice = tuple[str, dict[str, Any], "list[float] | None"]
"""Our method, its options, mixing weights."""


def _linear(config: Config) -> Choice:
    weights, total = config.each("weight", None), 0.0
    total = sum(weights)
    if not config.flag("normalize", True) and abs(total - 1) > 1e-9:
        raise config.fault("linear with normalize: false and weights that do not sum to 1 is not supported")
    if total <= 0 or min(weights) < 0:
        raise config.fault("weights of linear must not be negative, and not all 0")
    return "average", {}, [w / total for w in weights]


def _deltas(config: Config) -> dict[str, Any]:
    """Return the options of all task-vector methods: coefficients, and what scales their sum."""
    options: dict[str, Any] = {"weights": config.each("weight", 1.0)}
    config.used.add("lambda")
    scaling = config.value("lambda", 1.0)
    if isinstance(scaling, bool) or not isinstance(scaling, int | float):
        raise config.fault("lambda must be a number")
    return {**options, "scaling": float(scaling)}


def _unscaled(config: Config) -> None:
    if config.flag("rescale", False):
        raise config.fault(f"{config.method} with rescale: true is not supported")


def _task_arithmetic(config: Config) -> Choice:
    return "task-arithmetic", {**_deltas(config), "normalize": config.flag("normalize", False)}, None


def _ties(config: Config) -> Choice:
    _unscaled(config)
    how = "mean" if config.flag("normalize", True) else "sum"
    return "ties", {**_deltas(config), "density": config.each_or_one("density", 1.0), "merge_func": how}, None


def _breadcrumbs(config: Config) -> Choice:
    _unscaled(config)
    options = {
        **_deltas(config),
        "density": config.each_or_one("density", 1.0),
        "gamma": config.one("gamma", 0.01),
        "elect_signs": config.method == "breadcrumbs_ties",
        "normalize": config.flag("normalize", False),
    }
    return "breadcrumbs", options, None


def _dare(config: Config) -> Choice:
    options = {
        **_deltas(config),
        "density": config.each_or_one("density", 1.0),
        "rescale": config.flag("rescale", True),
        "normalize": config.flag("normalize", False),
    }
    return config.method.replace("_", "-"), options, None


def _della(config: Config) -> Choice:
    normalize = config.flag("normalize", False)
    if config.method == "della_linear" and normalize:
        raise config.fault("della_linear with normalize: true is not supported")
    how = "linear" if config.method == "della_linear" else "mean" if normalize else "sum"
    options = {
        **_deltas(config),
        "density": config.each_or_one("density", 1.0),
        "epsilon": 2 * config.one("epsilon", 0.15),
        "rescale": config.flag("rescale", True),
        "merge_func": how,
    }
    return "della", options, None


def _sce(config: Config) -> Choice:
    return "sce", {"select_topk": config.one("select_topk", 1.0)}, None


def _slerp(config: Config) -> Choice:
    paths = [path for path, _ in config.listed]
    if len(paths) == 1 and config.base is not None and config.base not in paths:
        paths = [config.base, *paths]
    if len(paths) != 2 or config.base not in paths:
        raise config.fault("slerp merges two models, one of which is base_model")
    return "slerp", {"t": config.one("t", 0.5)}, None


def _nuslerp(config: Config) -> Choice:
    weights = config.each("weight", None)
    if len(weights) != 2 or min(weights) < 0 or sum(weights) <= 0:
        raise config.fault("nuslerp merges two models with weights that are not negative, and not both 0")
    along = "tensor"
    rows = config.flag("nuslerp_row_wise", False)
    if not config.flag("nuslerp_flatten", True):
        along = "rows" if rows else "columns"
    options = {"along": along, "deltas": config.base is not None}
    return "nuslerp", options, [w / sum(weights) for w in weights]


def _model_stock(config: Config) -> Choice:
    return "model-stock", {"clamp": False, "filter_wise": config.flag("filter_wise", False)}, None


METHODS: Mapping[str, Callable[[Config], Choice]] = {
    "linear": _linear,
    "task_arithmetic": _task_arithmetic,
    "ties": _ties,
    "breadcrumbs": _breadcrumbs,
    "breadcrumbs_ties": _breadcrumbs,
    "dare_linear": _dare,
    "dare_ties": _dare,
    "della": _della,
    "della_linear": _della,
    "sce": _sce,
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "model_stock": _model_stock,
}


def from_mergekit(file: Path) -> dict[str, Any]:
    """Return mergekit's YAML as the tree of a recipe; model paths are looked for here, then beside the file.

    Raises ConfigError for what is not supported, naming it.
    """
    try:
        import yaml
    except ImportError:
        raise ConfigError("--from-mergekit needs PyYAML: pip install 'dimat[mergekit]'") from None
    try:
        tree: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} is not a mergekit configuration: it is no table")
    config = Config(cast("dict[str, Any]", tree), str(file))
    if config.method not in METHODS:
        raise ConfigError(unknown_name("merge method", config.method, METHODS, str(file)))
    if config.method == "linear":
        paths = [path for path, _ in config.listed]
    elif config.method == "slerp":
        paths = [config.base, *config.models()] if config.base else config.models()
    else:
        paths = config.models()
    found = [_found(path, file) for path in paths]
    choices = _choices(config, open_model(Path(found[0]))) if config.conditional else [(_choice(config), [])]
    config.check_used()
    method, options, mixing = choices[0][0]
    equal = [1 / len(paths)] * len(paths)
    base = None if config.method in ("linear", "slerp") else config.base
    rules = [
        {
            "regex": f"^(?:{'|'.join(map(re.escape, names))})$",
            "method": choice[0],
            "options": choice[1],
            "weights": choice[2] or equal,
        }
        for choice, names in choices[1:]
    ]
    recipe: dict[str, Any] = {
        "models": [{"path": path, "weight": w} for path, w in zip(found, mixing or equal)],
        "method": method,
        "options": options,
        "rules": rules,
    }
    types = {"input_dtype": tree.get("dtype"), "dtype": tree.get("out_dtype")}
    recipe |= {key: str(name) for key, name in types.items() if name}
    return recipe | ({"base": _found(base, file)} if base else {})


def _choice(config: Config) -> Choice:
    """Return what merges the tensors of a configuration; the base where no model has a weight."""
    method, options, mixing = METHODS[config.method](config)
    if "weights" in options and not any(options["weights"]):
        return "task-arithmetic", {"scaling": 0.0}, None
    return method, options, mixing


def _choices(config: Config, own: ModelFiles) -> list[tuple[Choice, list[str]]]:
    """Return what merges which tensors, the one that merges most of them first."""
    numbers = {name: int(match[1]) for name in own if (match := LAYER.search(name))}
    last = max(numbers.values(), default=0)
    groups: dict[str, tuple[Choice, list[str]]] = {}
    for name in own:
        if name in numbers:
            depth = numbers[name] / last if last else 1.0
        else:
            depth = 0.0 if BEFORE.search(name) else 1.0 if AFTER.search(name) else None
        choice = _choice(config.at(Place(name, depth)))
        groups.setdefault(repr(choice), (choice, []))[1].append(name)
    return sorted(groups.values(), key=lambda group: -len(group[1]))


def _found(path: str, file: Path) -> str:
    beside = file.parent / path
    return str(beside) if not Path(path).exists() and beside.exists() else path
