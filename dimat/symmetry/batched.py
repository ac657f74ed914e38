"""Makes `torch.func.vmap` traceable for any position of its axis in the result."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import Tensor

_VMAP: Any = import_module("torch._functorch.vmap")
_INNER: Any = import_module("torch._C._functorch")
_BRING_BACK = getattr(_VMAP, "_remove_batch_dim", None)
"""A private function of torch, which may disappear: without it, such axes remain as torch leaves them."""


@contextmanager
def traceable_vmap() -> Generator[None]:
    """Return mapped axes in their place, and move them with a separate operation.

    torch moves them inside of one call, unseen by any tracer, which then takes the result for a constant. Results are
    the same, so it does no harm to other threads that use `vmap` meanwhile.
    """
    if _BRING_BACK is None:
        yield
        return
    _VMAP._remove_batch_dim = _bring_back
    try:
        yield
    finally:
        _VMAP._remove_batch_dim = _BRING_BACK


def _bring_back(x: Tensor, level: int, size: int, out: int) -> Tensor:
    assert _BRING_BACK is not None
    held = _INNER.is_batchedtensor(x) and _INNER.maybe_get_level(x) == level
    place = _INNER.maybe_get_bdim(x) if held else out
    made = _BRING_BACK(x, level, size, place)
    return made if place == out else made.movedim(place, out)
