"""Plain values as TOML on one line, for files and for settings that people paste."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast


def quoted(text: str) -> str:
    """Return any text quoted as TOML."""
    # a JSON string is a TOML one, but for surrogate pairs and the delete character
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_value(value: Any) -> str:
    """Return a plain value as TOML, tables inline and without entries that are None."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, Mapping):
        table = cast("Mapping[str, Any]", value)
        inside = ", ".join(f"{_bare(key)} = {toml_value(item)}" for key, item in table.items() if item is not None)
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, cast('list[Any]', value)))}]"
    return repr(value)


def _bare(key: str) -> str:
    plain = key.isascii() and key.replace("-", "a").replace("_", "a").isalnum()
    return key if plain else quoted(key)
