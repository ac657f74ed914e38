"""All keys of an experiment: type, default and meaning of each, and where a value came from."""

from __future__ import annotations

import ast
import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from itertools import pairwise
from textwrap import dedent
from typing import Annotated, Any, Literal, cast, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dimat.config.experiment import ExperimentConfig
from dimat.config.tree import NamedConfig
from dimat.toml_text import toml_value

HIDDEN = frozenset({"folder"})
"""Fields that no file sets."""
NEAR = 3
"""Most keys that are named for an unknown one."""


@dataclass(frozen=True)
class Key:
    """A key: its `path`, as in `train.optimizer.lr` (`[]` after a list of tables), its type, its default as TOML ("" if
    there is none) and its meaning."""

    path: str
    type: str
    default: str
    meaning: str


def all_keys(pattern: str = "*") -> list[Key]:
    """Return the keys whose path matches a pattern (`*`, `?`, `[…]`), or contains it if it has none of these, in the
    order of the tables."""
    wanted = pattern if any(mark in pattern for mark in "*?[") else f"*{pattern}*"
    return [key for key in _keys() if fnmatchcase(key.path, wanted)]


def nearest_paths(name: str) -> list[str]:
    """Return the paths of keys, of all tables, whose last part is `name` or close to it, the closest first."""
    if len(name) > 100:  # a stranger may give a name of any length
        return []
    last: dict[str, list[str]] = {}
    for key in _keys():
        last.setdefault(key.path.rpartition(".")[2], []).append(key.path)
    close = get_close_matches(name, [*last], n=NEAR, cutoff=0.75)
    close += [part for part in last if len(name) > 3 and name in part and part not in close]
    return [path for match in close for path in last[match]][:NEAR]


@cache
def _keys() -> tuple[Key, ...]:
    return tuple(_walk(ExperimentConfig, "", {}))


def _walk(kind: type[BaseModel], prefix: str, seen: dict[type[BaseModel], str]) -> Iterator[Key]:
    """Give the keys of a table and of those in it; one that has stood elsewhere (`seen`) is named and not listed."""
    meanings = meanings_of(kind)
    for name, field in kind.model_fields.items():
        if not prefix and name in HIDDEN:
            continue
        path = f"{prefix}{name}"
        inner, listed = table_of(field.annotation)
        if inner is None or issubclass(inner, NamedConfig):
            yield Key(path, type_text(field), default_text(field), meanings.get(name, ""))
            continue
        path += "[]" if listed else ""
        kind_text = "list of tables" if listed else "table"
        known = f", as {seen[inner]}" if inner in seen else ""
        yield Key(path, f"{kind_text}{known}", "", meanings.get(name, ""))
        if not known:
            seen[inner] = path
            yield from _walk(inner, f"{path}.", seen)


@dataclass(frozen=True)
class Setting:
    """A key's value in an experiment, as TOML, and where it came from."""

    path: str
    value: str
    source: str


def settings_of(
    config: ExperimentConfig, file: str, tree: Mapping[str, Any], origins: Mapping[str, str]
) -> list[Setting]:
    """Return the values of all keys that have one. `file`, `tree`: the file's name and its plain values; `origins`: the
    sources of keys that came from elsewhere; what came from nowhere is the default."""
    return list(_settings(config, "", file, tree, origins))


def _settings(table: BaseModel, prefix: str, file: str, tree: Any, origins: Mapping[str, str]) -> Iterator[Setting]:
    for name in type(table).model_fields:
        if not prefix and name in HIDDEN:
            continue
        path, value = f"{prefix}{name}", getattr(table, name)
        given = tree.get(name) if isinstance(tree, Mapping) else None
        if isinstance(value, BaseModel) and not isinstance(value, NamedConfig):
            yield from _settings(value, f"{path}.", file, {"name": given} if isinstance(given, str) else given, origins)
        elif value is not None:
            elsewhere = next((o for p, o in origins.items() if f"{p}.".startswith(f"{path}.")), None)
            above = next((o for p, o in origins.items() if path.startswith(f"{p}.")), None)
            source = elsewhere or above or ("default" if given is None else file)
            yield Setting(path, to_toml(value), source)


def table_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """Return the table that a field holds, if any, and whether it is a list of such."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return table_of(arguments[0])
    for argument in arguments if origin in (typing.Union, types.UnionType, tuple, list) else ():
        inner, listed = table_of(argument)
        if inner is not None:
            return inner, listed or origin in (tuple, list)
    return None, False


def meanings_of(kind: type[BaseModel]) -> dict[str, str]:
    """Return the texts that stand below a table's fields, each on one line; of the classes that it extends, too."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not (issubclass(base, BaseModel) and base is not BaseModel):
            continue
        try:
            (body,) = ast.parse(dedent(inspect.getsource(base))).body
        except (OSError, SyntaxError):  # without source files nothing but the meaning is missing
            continue
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for field, text in pairwise(statements):
            told = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and text.value.value
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(told, str):
                found[field.target.id] = " ".join(told.split())
    return found


def type_text(field: FieldInfo) -> str:
    """Return a field's type as people write it: `number`, `text`, `"a" | "b"`, `list of text`."""
    return _type(field.annotation)


def _type(annotation: Any) -> str:
    names = {int: "integer", float: "number", str: "text", bool: "true | false", Any: "any"}
    if annotation in names:
        return names[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " | ".join(to_toml(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(_type(argument) for argument in arguments if argument is not type(None)))
    if origin in (tuple, list, frozenset, set):
        return f"list of {_type(arguments[0])}" if arguments else "list"
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return f"table of {_type(arguments[1])}" if arguments else "table"
    if isinstance(annotation, type) and issubclass(annotation, NamedConfig):
        return "name | { name, options }"
    return "table" if isinstance(annotation, type) and issubclass(annotation, BaseModel) else "any"


def default_text(field: FieldInfo) -> str:
    """Return a field's default as TOML; "" if it has none, or is off without a value."""
    value = field.get_default(call_default_factory=True)
    return "" if field.is_required() or value is None else to_toml(value)


def to_toml(value: Any) -> str:
    """Return the value of a key as TOML on one line; a named choice without options is its name."""
    return toml_value(_plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        table = value.model_dump(exclude_defaults=True)
        return table["name"] if table.keys() == {"name"} else table
    return [_plain(item) for item in cast("list[Any]", value)] if isinstance(value, list | tuple) else value
