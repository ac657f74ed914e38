"""The documents of a merged model: provenance, model card, and a correct config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dimat.json_text import to_json
from dimat.merge_files.recipe import DTYPES, Recipe
from dimat.reading import read_table


def provenance(version: str, recipe: Recipe, inputs: Mapping[str, Mapping[str, str]]) -> str:
    """Return the provenance of a merge as JSON: {version, recipe, inputs: {model: {file: blake3}}}."""
    plain = recipe.model_dump(mode="json", exclude_defaults=True)
    return to_json({"version": version, "recipe": plain, "inputs": inputs})


def config_of(file: Path, dtype: str | None) -> bytes:
    """Return a file that accompanies the weights; in config.json, with the type of the merged weights."""
    data = file.read_bytes()
    if file.name != "config.json" or dtype is None:
        return data
    config = read_table(file)
    named = str(DTYPES[dtype]).removeprefix("torch.")
    changed = {key: named for key in ("torch_dtype", "dtype") if key in config}
    return (json.dumps({**config, **changed}, indent=2) + "\n").encode() if changed else data


def model_card(name: str, plan: Mapping[str, Any], inputs: Mapping[str, Mapping[str, str]], record: str) -> bytes:
    """Return the README.md of a merged model's folder."""
    weights = {model["path"]: f"{model['weight']:g}" for model in plan["models"]}
    rows: list[str] = []
    for model, files in inputs.items():
        role = weights.get(model, "base" if model == plan["base"] else "run with")
        rows += [f"| `{model}` | {role} | `{file}` | `{digest}` |" for file, digest in files.items()]
    options = "".join(f", `{key}` = {value}" for key, value in plan["options"].items())
    known = json.loads(record)
    recipe = to_json(known["recipe"], indent=2)
    lines = [
        "---",
        "tags:",
        "- merge",
        "- dimat",
        "---",
        f"# {name}",
        "",
        f"Merged by dimat {known['version']} with the method `{plan['method']}`{options}: "
        f"{plan['tensors']:,} tensors, {plan['bytes']:,} bytes.",
        "",
        "| model | weight | file | blake3 |",
        "|---|---|---|---|",
        *rows,
        "",
        "The recipe, which is also in the metadata of the weights:",
        "",
        "```json",
        recipe,
        "```",
        "",
    ]
    return "\n".join(lines).encode()
