"""The wide zoo in CI: every model that is cheap enough is traced, and meets the targets for it.

Reference: group counts by hand, and a float64 forward pass under random group elements. Seconds are not asserted
here; `make zoo` measures them.
"""

from __future__ import annotations

import pytest

from dimat.errors import SymmetryError  # noqa: F401

from .wide import ENTRIES, measure
from .wide.measure import MOST_DERIVE_SECONDS

COSTLY: dict[str, str] = {}
NOT_YET: dict[str, str] = {}
