"""Variants: other forms of an experiment, run side by side by `dimat simulate --compare`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, cast

from pydantic import Field

from dimat.config.tree import Options, Tree

Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$", max_length=40)]


class VariantConfig(Tree):
    """The experiment with some settings changed. Only `--compare` looks at it."""

    name: Label
    """The variant's name in `--compare` and its tables; it also names a folder."""
    group: Label | None = None
    """Group of the variant: variants of one group share a table and a row of plots. Default: the data's split."""
    set: Options = Field(default_factory=dict)
    """The changes, as tables of the experiment, e.g. { topology = { graph = "torus" } }."""


RIVALS: Mapping[str, tuple[str, ...]] = {
    "task": ("name", "hook"),
    "topology": ("map", "graph", "edges", "file", "python"),
    "train": ("epochs_per_round", "steps_per_round"),
    "merge.base": ("file", "seed"),
}
"""Keys of which a table takes one, by table: a value that is given later takes the place of its rivals'."""


def rivals_of(table: str, key: str) -> list[str]:
    """Return the keys that a key of a table excludes. `table`: its path, as in `merge.base`."""
    group = RIVALS.get(table, ())
    return [rival for rival in group if rival != key] if key in group else []


def without_rivals(tree: dict[str, Any], table: str, key: str) -> None:
    """Remove the rivals of a key from a table of plain values. `table`: its path, as in `merge.base`."""
    for rival in rivals_of(table, key):
        tree.pop(rival, None)


def changed(tree: Mapping[str, Any], changes: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return a tree of plain values with changes merged in, key by key.

    A table with a new `name` replaces the old one as a whole, since its options belong to the old name; of keys that
    exclude each other, a change replaces the others. `path`: of the tree in the experiment.
    """
    made = dict(tree)
    for key in changes:
        without_rivals(made, path, key)
    for key, value in changes.items():
        before = made.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            old, new = cast("Mapping[str, Any]", before), cast("Mapping[str, Any]", value)
            renamed = "name" in new and new["name"] != old.get("name")
            made[key] = dict(new) if renamed else changed(old, new, f"{path}.{key}".removeprefix("."))
        else:
            made[key] = value
    return made
