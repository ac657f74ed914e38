"""The wide zoo: models of torchvision, timm, transformers and our own, and what symmetry derivation must find in them.

`python -m tests.symmetry.wide` measures them all and prints a table; `tests/symmetry/test_wide.py` is its form in CI.
"""

from tests.symmetry.wide import diffusion, images_timm, language, own, vision
from tests.symmetry.wide.entry import Built, Entry, build
from tests.symmetry.wide.measure import Row, Subject, measure, shortcomings

ENTRIES = {entry.name: entry for part in (vision, images_timm, language, own, diffusion) for entry in part.ENTRIES}

__all__ = ["ENTRIES", "Built", "Entry", "Row", "Subject", "build", "measure", "shortcomings"]
