"""mergekit's YAML as a recipe, for the methods that both have.

With gradients or filters, values are computed for each tensor, and tensors with the same values become one rule of the
recipe. A configuration that would not give the same result is refused; DARE and DELLA draw other random numbers, from
the same distribution. Facts are from mergekit 0.1.5's documentation, behaviour and golden runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from dimat.errors import ConfigError, unknown_name
from dimat.merge_files.files import ModelFiles
from dimat.merge_files.folders import open_model
from dimat.merge_files.mergekit_config import Config, Place
from dimat.merge_files.mergekit_methods import METHODS, NEAREST, Choice
from dimat.reading import check_plain, read_text

LAYER = re.compile(r"^((?:.*?\.)?(?:layers|layer|h|blocks|block)\.)(\d+)\.")
"""The prefix of the layer number in a tensor's name, and the number."""

NUMBERED = re.compile(r"(?:^|[._])\d+(?:[._]|$)")
"""A number in a name: it may be a layer's."""


def from_mergekit(file: Path) -> dict[str, Any]:
    """Return mergekit's YAML as the tree of a recipe; model paths are looked up here, then beside the file.

    Raises ConfigError for unsupported settings, naming them.
    """
    try:
        import yaml
    except ImportError:
        raise ConfigError("--from-mergekit needs PyYAML: pip install 'dimat[mergekit]'") from None
    text = read_text(file, ConfigError)
    try:
        tree: Any = check_plain(yaml.safe_load(text), text=True)
    except (yaml.YAMLError, ValueError) as error:  # a date that there is not is a ValueError
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{file} is nested too deeply") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} is not a mergekit configuration: it is not a table")
    config = Config(cast("dict[str, Any]", tree), str(file))
    if config.method not in METHODS:
        nearest = f"; {NEAREST[config.method]}" if config.method in NEAREST else ""
        raise ConfigError(unknown_name("merge method", config.method, METHODS, str(file)) + nearest)
    if config.method in ("linear", "karcher"):
        paths = [path for path, _ in config.listed]
    elif config.method == "slerp":
        paths = [config.base, *config.models()] if config.base else config.models()
    else:
        paths = config.models()
    found = [_found(path, file) for path in paths]
    opened = open_model(Path(found[0]))
    _check_layers(config, opened)
    choices = _choices(config, opened) if config.conditional else [(_choice(config), [])]
    config.check_used()
    _check_axes(config, [choice for choice, _ in choices], opened)
    method, options, mixing = choices[0][0]
    equal = [1 / len(paths)] * len(paths)
    base = None if config.method in ("linear", "slerp", "karcher") else config.base
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
    recipe |= {key: str(name).removeprefix("torch.") for key, name in types.items() if name}
    recipe |= {"align_vocabulary": True} if config.align_vocabulary else {}
    return recipe | ({"base": _found(base, file)} if base else {})


def _choice(config: Config) -> Choice:
    """Return the method that merges the tensors of a configuration; the base if no model has a weight."""
    method, options, mixing = METHODS[config.method](config)
    if "weights" in options and not any(options["weights"]):
        return "task-arithmetic", {"scaling": 0.0}, None
    return method, options, mixing


def _choices(config: Config, own: ModelFiles) -> list[tuple[Choice, list[str]]]:
    """Return the methods and their tensors, first the one that merges most of them."""
    last = _layer_counts(own)
    groups: dict[str, tuple[Choice, list[str]]] = {}
    for name in own:
        match = LAYER.search(name)
        if match:
            depth = int(match[2]) / (last[match[1]] - 1) if last[match[1]] > 1 else 1.0
        else:  # mergekit gives all tensors outside the layers, the last ones too, a gradient's first value
            depth = None if NUMBERED.search(name) else 0.0
        choice = _choice(config.at(Place(name, depth)))
        groups.setdefault(repr(choice), (choice, []))[1].append(name)
    return sorted(groups.values(), key=lambda group: -len(group[1]))


def _layer_counts(own: ModelFiles) -> dict[str, int]:
    """Return the number of layers of each stack, by the prefix of their number in the tensors' names."""
    counts: dict[str, int] = {}
    for name in own:
        if match := LAYER.search(name):
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    return counts


def _check_layers(config: Config, own: ModelFiles) -> None:
    """Raise if slices do not take every layer of every model."""
    if not config.layers:
        return
    counts = _layer_counts(own)
    if len(counts) != 1:
        raise config.fault("slices are for models with one stack of layers; give models instead")
    (count,) = counts.values()
    for path, taken in config.layers.items():
        if taken != (0, count):
            raise config.fault(
                f"layer_range {[*taken]} of {path} is not all of its layers, [0, {count}]: layers stay where they are; "
                "for other values in some layers use a gradient, a filter or the rules of a dimat recipe"
            )


def _check_axes(config: Config, choices: Sequence[Choice], own: ModelFiles) -> None:
    """Raise if tensors have more axes than rows and columns, which mergekit cuts in another way."""
    apart = [choice for choice in choices if choice[1].get("along") in ("rows", "columns")]
    for name, info in own.infos.items() if apart else ():
        if len(info.shape) > 2:
            raise config.fault(f"nuslerp_flatten: false is not supported for {name!r}, {info}; leave it out")


def _found(path: str, file: Path) -> str:
    beside = file.parent / path
    return str(beside) if not Path(path).exists() and beside.exists() else path
