"""Keys and values of an experiment for a person: `dimat config`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from textwrap import wrap

from dimat.config.keys import Key, Setting
from dimat.ui.text import clean

INDENT = 4


def key_lines(keys: Sequence[Key], width: int | None = None) -> list[str]:
    """Return for each key a line with type and default, and its meaning below."""
    columns = width or shutil.get_terminal_size().columns
    lines: list[str] = []
    for key in keys:
        default = f" = {key.default}" if key.default else ""
        lines.append(f"{key.path}{default}  ({key.type})")
        lines += [" " * INDENT + line for line in wrap(key.meaning, max(columns - INDENT, 20))]
    return lines


def setting_lines(settings: Sequence[Setting]) -> list[str]:
    """Return a line for each value, `path = value`, with its source as a TOML comment in a column of its own."""
    texts = [f"{each.path} = {clean(each.value)}" for each in settings]
    width = max((len(text) for text in texts if len(text) <= 60), default=0)
    return [f"{text:<{width}}  # {clean(each.source)}" for text, each in zip(texts, settings, strict=True)]
