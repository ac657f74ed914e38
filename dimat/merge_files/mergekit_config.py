"""mergekit's configuration: models, slices, and parameters that may differ between tensors.

A parameter is a value, a gradient over the layers (a list of numbers), or a list of such values with a filter (a part
of a tensor's name), of which the first match counts. A model's own value takes precedence over the slice's, and the
slice's over the common one. Facts are from mergekit 0.1.5's documentation and behaviour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from dimat.errors import ConfigError

IGNORED = {"int8_mask"}
"""Parameters that change mergekit's computation, but not its result."""

KEYS = {"merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "name"}
"""Keys of a configuration that are read; others are allowed only without a value."""

INSTEAD = {
    "modules": "merge the whole model, or each part by the rules of a dimat recipe",
    "chat_template": "leave it out, and put the template into the merged model's folder",
    "tokenizer_source": "leave it out if all models have one vocabulary; 'base' brings the rows of embeddings into "
    "the base's order",
    "tokenizer": "leave it out if all models have one vocabulary; source: base brings the rows of embeddings into "
    "the base's order",
}
"""Alternatives to keys that are not supported."""


@dataclass(frozen=True)
class Place:
    """A tensor: its name, and its position between the first layer (0) and the last (1), None if unknown."""

    name: str
    depth: float | None


class Config:
    """A mergekit configuration: global parameters, and those of each model that is merged.

    `layers`: the range of layers that slices take of each model, by path; nothing if there are no slices.
    """

    def __init__(self, tree: Mapping[str, Any], where: str) -> None:
        self.where = where
        self.layers: dict[str, tuple[int, int]] = {}
        self.align_vocabulary = self._takes_base_tokens(tree)
        unknown = {key for key, value in tree.items() if value is not None} - KEYS
        unknown -= {"tokenizer_source", "tokenizer"} if self.align_vocabulary else set()
        if unknown:
            key = min(unknown)
            raise self.fault(
                f"{key!r} of mergekit is not supported; {INSTEAD.get(key, 'write a dimat recipe instead')}"
            )
        self.method = str(tree.get("merge_method") or "linear")
        self.base: str | None = None if tree.get("base_model") is None else self._path(tree["base_model"])
        self.common = self._table(tree.get("parameters"))
        self.of_slice: dict[str, Any] = {}
        models, slices = tree.get("models"), tree.get("slices")
        if slices and not models:
            self.listed = self._sliced(slices)
        elif not isinstance(models, list) or not models:
            raise self.fault("models must be a list of models")
        elif slices:
            raise self.fault("models and slices cannot both be given: leave out slices")
        else:
            self.listed = [self._model(entry, {"model", "parameters"}) for entry in cast("list[Any]", models)]
        if self.base is not None and self.method in ("linear", "karcher"):  # to these the base is a model like others
            paths = [path for path, _ in self.listed]
            self.listed += [] if self.base in paths else [(self.base, {})]
        self.used: set[str] = set()
        self.place: Place | None = None

    def fault(self, text: str) -> ConfigError:
        return ConfigError(f"{self.where}: {text}")

    @property
    def conditional(self) -> bool:
        """Tell whether a parameter depends on the tensor."""
        tables = [self.common, self.of_slice, *(own for _, own in self.listed)]
        return any(isinstance(value, list | dict) for table in tables for value in table.values())

    def at(self, place: Place) -> Config:
        """Return the configuration of one tensor."""
        config = copy(self)
        config.place = place
        return config

    def value(self, key: str, default: Any, own: Mapping[str, Any] | None = None) -> Any:
        """Return a parameter: the model's own, else the slice's, else the common one, else the default."""
        for table in ([own] if own else []) + [self.of_slice, self.common]:
            found = self._evaluated(key, table[key]) if key in table else None
            if found is not None:
                return found
        return default

    def _evaluated(self, key: str, setting: Any) -> Any:
        """Return the value of a setting for the tensor; None if it has none for it."""
        if not isinstance(setting, list | dict):
            return setting
        entries: list[Any] = cast("list[Any]", setting) if isinstance(setting, list) else [setting]
        if self.place is None or not entries:
            raise self.fault(f"{key} is an empty list" if not entries else f"{key} cannot differ between tensors")
        numbers = [_number(entry) for entry in entries]
        if all(isinstance(entry, bool) for entry in entries) or None not in numbers:
            return self._gradient(key, entries if None in numbers else cast("list[float]", numbers), self.place)
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

    def _gradient(self, key: str, values: Sequence[Any], place: Place) -> Any:
        if place.depth is None:
            if any(value != values[0] for value in values):
                raise self.fault(f"gradient of {key}: in which layer is {place.name!r}?")
            return values[0]
        way = place.depth * (len(values) - 1)
        if isinstance(values[0], bool):  # switches are not interpolated
            return values[int(way)]
        low = min(int(way), max(len(values) - 2, 0))
        return (1 - way + low) * values[low] + (way - low) * values[min(low + 1, len(values) - 1)]

    def models(self) -> list[str]:
        """Return the models that are merged, without the base."""
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
            number = _number(value)
            if number is None:
                where = f" for {self.place.name}" if self.place is not None else ""
                raise self.fault(f"{key} of {path} {'is missing' if value is None else 'is not a number'}{where}")
            found.append(number)
        return found

    def one(self, key: str, default: float) -> float:
        """Return a number that all merged models share."""
        values = set(self.each(key, default))
        if len(values) > 1:
            raise self.fault(f"models with their own {key} are not supported; give all the same")
        return values.pop()

    def each_or_one(self, key: str, default: float) -> float | list[float]:
        """Return a number that all merged models share, or one for each."""
        values = self.each(key, default)
        return values[0] if len({*values}) == 1 else values

    def number(self, key: str, default: float) -> float:
        """Return a global number."""
        self.used.add(key)
        number = _number(self.value(key, default))
        if number is None:
            raise self.fault(f"{key} must be a number")
        return number

    def flag(self, key: str, default: bool) -> bool:
        """Return a global switch."""
        self.used.add(key)
        value = self.value(key, default)
        if not isinstance(value, bool):
            raise self.fault(f"{key} must be true or false")
        return value

    def check_used(self) -> None:
        """Raise if a parameter was given but not used, so that none is ignored silently."""
        given = {key for _, own in self.listed for key in own} | self.common.keys() | self.of_slice.keys()
        left = given - self.used - IGNORED
        if left:
            raise self.fault(f"parameter {min(left)!r} of {self.method} is not supported; leave it out")

    def _takes_base_tokens(self, tree: Mapping[str, Any]) -> bool:
        """Tell whether embeddings are brought into the order of the base's tokens; equal vocabularies stay
        unchanged."""
        tokenizer: Any = tree.get("tokenizer")
        if isinstance(tokenizer, dict) and tree.get("tokenizer_source") is None:
            table = cast("dict[str, Any]", tokenizer)
            return table.get("source") == "base" and not any(v for key, v in table.items() if key != "source")
        return tokenizer is None and tree.get("tokenizer_source") == "base"

    def _sliced(self, slices: Any) -> list[tuple[str, dict[str, Any]]]:
        """Return the models of one slice; its layers are checked when the models are open."""
        if not isinstance(slices, list) or len(cast("list[Any]", slices)) != 1:
            raise self.fault(
                "several slices are not supported: layers stay where they are. One slice over all layers is; "
                "values by layer are gradients, or rules of a dimat recipe"
            )
        entry: Any = slices[0]
        sources: Any = cast("dict[str, Any]", entry).get("sources") if isinstance(entry, dict) else None
        if not isinstance(sources, list) or not sources:
            raise self.fault("every entry of slices has sources, a list of models with layer_range")
        table = cast("dict[str, Any]", entry)
        unknown = {key for key, v in table.items() if v is not None} - {"sources", "base_model", "parameters"}
        if unknown:
            raise self.fault(f"{min(unknown)!r} of a slice is not supported; leave it out")
        if table.get("base_model") is not None:
            self.base = self._path(table["base_model"])
        self.of_slice = self._table(table.get("parameters"))
        listed: list[tuple[str, dict[str, Any]]] = []
        for source in cast("list[Any]", sources):
            path, own = self._model(source, {"model", "parameters", "layer_range"})
            taken: Any = source.get("layer_range")
            if not isinstance(taken, list) or [type(n) for n in cast("list[Any]", taken)] != [int, int]:
                raise self.fault(f"layer_range of {path} must be two numbers, [first, one after the last]")
            self.layers[path] = (taken[0], taken[1])
            listed.append((path, own))
        return listed

    def _table(self, value: Any) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.fault("parameters must be a table")
        return {key: v for key, v in cast("dict[str, Any]", value).items() if v is not None}

    def _model(self, entry: Any, keys: set[str]) -> tuple[str, dict[str, Any]]:
        if not isinstance(entry, dict) or "model" not in entry or entry.keys() - keys:
            raise self.fault(f"every entry of models has model, and may have {', '.join(sorted(keys - {'model'}))}")
        table = cast("dict[str, Any]", entry)
        return self._path(table["model"]), self._table(table.get("parameters"))

    def _path(self, value: Any) -> str:
        """Return the path of a model, given as text or as {model: {path: …}}, without an adapter or a revision."""
        reference, revision, lora = value, None, None
        for _ in range(2):
            if isinstance(reference, dict):
                table = cast("dict[str, Any]", reference)
                unknown = {k for k, v in table.items() if v is not None} - {"model", "path", "revision", "lora"}
                if unknown:
                    raise self.fault(f"{min(unknown)!r} of a model is not supported; leave it out")
                revision, lora = table.get("revision") or revision, table.get("lora") or lora
                reference = table.get("model", table.get("path"))
        if not isinstance(reference, str) or not reference:
            raise self.fault(f"a model is named by its path, got {value!r}")
        if not Path(reference).exists() and not (Path(self.where).parent / reference).exists():
            reference, plus, adapter = reference.partition("+")
            lora = adapter if plus else lora
            reference, at, version = reference.partition("@")
            revision = version if at else revision
        if isinstance(lora, dict):
            lora = cast("dict[str, Any]", lora).get("path")
        if lora is not None:
            raise self.fault(
                f"model {reference} with the adapter {lora}: merge them first (dimat merge {lora} --base {reference} "
                "--into-base -o FOLDER) and name FOLDER"
            )
        if revision is not None:
            raise self.fault(f"revision {revision!r} of {reference}: nothing is downloaded, name a snapshot's folder")
        return reference


def _number(value: Any) -> float | None:
    """Return a number; YAML reads 1e-5 as text, which is accepted too."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None
