"""A recipe's tensors in parts that are merged alike."""

from __future__ import annotations

from dataclasses import dataclass

from dimat.config.tree import Options


@dataclass(frozen=True)
class Part:
    """Tensors that are merged alike."""

    names: tuple[str, ...]
    method: str
    options: Options
    mixing: list[float]
