"""The wide zoo: models of torchvision, timm, transformers and our own, and what symmetry derivation must find in them.

`python -m tests.symmetry.wide` measures them all and prints a table; `tests/symmetry/test_wide.py` is its form in CI.
"""

from tests.symmetry.wide import compositions, diffusion, families, images_timm, language, own, structures, vision
from tests.symmetry.wide.entry import Built, Entry, build
from tests.symmetry.wide.measure import Row, Subject, measure, shortcomings

_PARTS = (vision, images_timm, language, families, own, structures, compositions, diffusion)

ENTRIES = {entry.name: entry for part in _PARTS for entry in part.ENTRIES}

__all__ = ["ENTRIES", "Built", "Entry", "Row", "Subject", "build", "measure", "shortcomings"]
