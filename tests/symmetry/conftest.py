"""One thread a test process: the networks here are small, and xdist runs one process a core.

Tests of single operations leave out most of a network, so that what stays in place is a large share of it: only the
tests of that warning are about it.
"""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let SYM-W08 pass in the tests of this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:SYM-W08:dimat.symmetry.SymmetryWarning"), append=False)
