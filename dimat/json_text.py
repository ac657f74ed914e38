"""Writes JSON that every parser reads: numbers that are not finite become null."""

from __future__ import annotations

import json
import math
from typing import Any, cast


def to_json(value: Any, **options: Any) -> str:
    """Return plain values as JSON; numbers that are not finite become null. `options`: of `json.dumps`."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # rare, and looking at each number takes longer than writing all of them
        return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: Any) -> Any:
    """Return plain values with None in place of numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in cast("list[Any]", value)]
    return value
