"""Reads an experiment from TOML file, environment and flags; explains a fault in one line."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dimat.config.experiment import ExperimentConfig
from dimat.config.variants import rivals_of, without_rivals
from dimat.errors import ConfigError, nearest
from dimat.reading import check_plain, parse_toml, read_text
from dimat.toml_text import quoted

T = TypeVar("T", bound=BaseModel)
LONGEST = 200
"""Longest part of a wrong value that messages show, in characters."""


def load_experiment(
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> ExperimentConfig:
    """Read an experiment: TOML file, `DIMAT_*` variables, `key=value` overrides; the last wins, also over a key that
    excludes it (`task.hook` over the file's `task.name`).

    `overrides` and variables name a key by its path (`train.optimizer.lr=0.01`, `DIMAT_TRAIN__OPTIMIZER__LR`);
    values are TOML, or plain text if they are not valid TOML. Raises ConfigError with file, key and nearest match.
    """
    return load_with_origins(file, overrides, env)[0]


def load_with_origins(
    file: str | Path | None = None, overrides: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> tuple[ExperimentConfig, dict[str, str]]:
    """Read an experiment as `load_experiment` does; also return where the keys that the file has not set came from."""
    tree: dict[str, Any] = {} if file is None else read_toml(file)
    origins: dict[str, str] = {}
    for name, text in sorted((os.environ if env is None else env).items()):
        path = name.removeprefix("DIMAT_").lower().split("__")
        # DIMAT_ variables with one level may be somebody else's; a table and a key are meant for us
        if name.startswith("DIMAT_") and (path[0] in ExperimentConfig.model_fields or len(path) > 1):
            _put(tree, path, text, name)
            _came_from(origins, path, name)
    for item in overrides:
        key, sign, text = item.partition("=")
        key = key.strip()
        if not sign:
            raise ConfigError(f"--set {item!r}: expected KEY=VALUE, e.g. --set train.batch_size=64")
        _put(tree, key.split("."), text.strip(), f"--set {key}")
        _came_from(origins, key.split("."), f"--set {key}")
    where = str(file) if file is not None else "the command line"
    if "folder" in tree:
        raise ConfigError(f"unknown key 'folder' in {origins.get('folder', where)}: it is the file's own folder")
    tree["folder"] = str(Path(file).parent) if file is not None else "."
    return build(ExperimentConfig, tree, where, origins), origins


def read_toml(file: str | Path) -> dict[str, Any]:
    """Read a TOML file; raises ConfigError if it cannot be read or parsed."""
    text = read_text(file, ConfigError)
    try:
        return parse_toml(text)
    except ValueError as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error


def parse_value(text: str, where: str) -> Any:
    """Return the value of a setting written as TOML, or as plain text if that is not valid TOML. Raises ConfigError,
    which begins with `where`, for values outside the bounds of `dimat.reading`."""
    try:
        table = parse_toml(f"value = {text}")
        return check_plain(table["value"] if table.keys() == {"value"} else text, text=True)
    except tomllib.TOMLDecodeError:
        value = text
    except ValueError as error:
        raise ConfigError(f"{where}: {str(error).removeprefix('value ')}") from None
    try:
        return check_plain(value, text=True)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def build(kind: type[T], tree: Mapping[str, Any], where: str, origins: Mapping[str, str] | None = None) -> T:
    """Validate a tree of plain values; the first fault becomes a one-line ConfigError.

    `where` names the source of the values, `origins` the sources of single keys that came from elsewhere.
    """
    try:
        check_plain({key: value for key, value in tree.items() if key != "folder"}, text=True)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(kind, error, where, origins or {})) from None


def _came_from(origins: dict[str, str], path: Sequence[str], source: str) -> None:
    """Note the source of a key, which is the source of all that is below it, too, and ends its rivals'."""
    table, key = ".".join(path[:-1]), ".".join(path)
    ended = [key, *(f"{table}.{rival}".removeprefix(".") for rival in rivals_of(table, path[-1]))]
    for other in [each for each in origins if any(f"{each}.".startswith(f"{end}.") for end in ended)]:
        del origins[other]
    origins[key] = source


def _put(tree: dict[str, Any], path: Sequence[str], text: str, where: str) -> None:
    value = parse_value(text, where)
    for key in path[:-1]:
        child = tree.get(key)
        if isinstance(child, str):  # a stage that was given by name alone
            child = {"name": child}
        elif child is True:  # a table that was switched on
            child = {}
        elif child is not None and not isinstance(child, dict):
            raise ConfigError(f"{where}: {key!r} is a value, not a table")
        tree[key] = dict(child or {})
        tree = tree[key]
    without_rivals(tree, ".".join(path[:-1]), path[-1])
    tree[path[-1]] = value


def _explain(kind: type[BaseModel], error: ValidationError, where: str, origins: Mapping[str, str]) -> str:
    faults = error.errors(include_url=False)
    first = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    location = [part for part in first["loc"] if not str(part).startswith("function-")]
    dotted = ".".join(map(str, location))
    for path, origin in origins.items():
        if f"{dotted}.".startswith(f"{path}.") or f"{path}.".startswith(f"{dotted}."):
            where = origin
    key = _shown(location)
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r} in {where}{_advice(kind, location)}"
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f" (got {_short(given)})" if isinstance(given, str | int | float | bool) else ""
    return f"{where}: {key}: {message}{shown}" if key else f"{where}: {message}{shown}"


def _advice(kind: type[BaseModel], location: Sequence[str | int]) -> str:
    """Return the nearest keys for an unknown one: of its own table, else of all tables of an experiment."""
    near = nearest(str(location[-1]), _known(kind, location[:-1]))
    if near or kind is not ExperimentConfig:
        return near
    from dimat.config.keys import nearest_paths

    paths = nearest_paths(str(location[-1]))
    return f"; did you mean {' or '.join(map(repr, paths))}?" if paths else ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _shown(location: Sequence[str | int]) -> str:
    """Return a key's path as users write it: `simulate.faults[2].kind`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")


def _known(kind: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Return the keys of the table at `path`, for suggestions."""
    for part in path:
        if isinstance(part, int):  # an entry of an array of tables, whose kind we have already
            continue
        field = kind.model_fields.get(part)
        if field is None:
            return []
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        kinds = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not kinds:
            return []
        kind = kinds[0]
    return list(kind.model_fields)


def naming(name: str | None) -> tuple[str, ...]:
    """Return the overrides that give an agent its name, which may hold any characters; none for None."""
    return () if name is None else (f"agent.name={quoted(name)}",)
