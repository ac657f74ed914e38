"""Checks values from a log or a peer, which may be missing or of any form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, cast

from dimat.ui.text import clean

MOST_TEXT = 300
MOST_NAMES = 10_000
MOST_GROUPS = 500


def number(value: object) -> float | None:
    """Return a finite number, None for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e18:
        return value
    return None


def count(value: object) -> int:
    """Return a whole number from 0 on; 0 for anything else."""
    known = number(value)
    return max(0, int(known)) if known is not None else 0


def text(value: object, most: int = MOST_TEXT) -> str:
    """Return text of one line without control characters, cut if it is long; "" for None."""
    if value is None:
        return ""
    line = clean(str(value)[: most + 1])
    return line if len(line) <= most else f"{line[:most]}…"


def name(value: object) -> str:
    """Return an agent's name; "" for anything else."""
    return clean(value) if isinstance(value, str) and 0 < len(value) <= 100 else ""


def mapping(value: object) -> Mapping[str, Any]:
    """Return a mapping, empty for anything else."""
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def shares(value: object) -> dict[str, float]:
    """Return shares by group, at most `MOST_GROUPS` of them; values that are not numbers are left out."""
    known = {text(group, 80): number(share) for group, share in islice(mapping(value).items(), MOST_GROUPS)}
    return {group: share for group, share in known.items() if share is not None}


def items(value: object) -> Sequence[Any]:
    """Return a list, empty for anything else; at most `MOST_NAMES` of it."""
    return cast("Sequence[Any]", value)[:MOST_NAMES] if isinstance(value, (list, tuple)) else ()
