"""When to look: a geometric schedule of checks, so that checking costs little however long the data are."""

from __future__ import annotations

from math import ceil


class GeometricChecks:
    """Checks that are due once `first` images have been seen, then each time their number has grown by `factor`."""

    def __init__(self, first: int, factor: float = 2.0) -> None:
        self._next = first
        self._factor = factor

    def due(self, images: int) -> bool:
        """Tell whether a check is due after `images` images in all."""
        if images < self._next:
            return False
        while self._next <= images:
            self._next = ceil(self._next * self._factor)
        return True
