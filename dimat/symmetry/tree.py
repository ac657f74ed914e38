"""Nested inputs and outputs of models, flattened in the order that `torch.export` uses.

This is the package's only use of `torch.utils._pytree` (private, but export itself is built on it).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree  # pyright: ignore[reportPrivateUsage]


def leaves(tree: Any) -> list[Any]:
    """Return all leaves of nested tuples, lists, dicts and registered output classes."""
    return pytree.tree_leaves(tree)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Return (path, leaf) pairs; a path is keys joined by dots, or `output` for a bare leaf.

    If a class was registered without keys, like the output classes of diffusers, its children are named by number.
    """
    return [(".".join(path) or "output", leaf) for path, leaf in _walk(tree, ())]


def _walk(tree: Any, path: tuple[str, ...]) -> Generator[tuple[tuple[str, ...], Any]]:
    def below(node: Any) -> bool:
        return node is not tree

    children: list[tuple[tuple[Any, ...], Any]]
    try:
        children = pytree.tree_flatten_with_path(tree, is_leaf=below)[0]
    except ValueError:  # no keys are registered for this class
        children = [((number,), child) for number, child in enumerate(pytree.tree_flatten(tree, is_leaf=below)[0])]
    for keys, child in children:
        if child is tree:
            yield path, child
        else:
            yield from _walk(child, (*path, *map(_key, keys)))


def map_tensors(function: Any, tree: Any) -> Any:
    """Return the same structure with `function` applied to every tensor in it."""

    def apply(leaf: Any) -> Any:
        return function(leaf) if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(apply, tree)


def rebuilt(tree: Any, values: list[Any]) -> Any:
    """Return the same structure with other leaves, in the order of `leaves`."""
    return pytree.tree_unflatten(values, pytree.tree_structure(tree))


def as_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) for inputs as a user gives them: one tensor, a sequence, or a mapping of names."""
    if isinstance(example_inputs, Mapping):
        return (), {str(name): value for name, value in example_inputs.items()}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _key(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
