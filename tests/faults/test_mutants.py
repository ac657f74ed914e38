"""The checks themselves: each fault made on purpose in the machine or its driver must be found."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.hunt import catch
from tests.faults.mutants import MUTANTS, Mutant

MOST = 5000


@pytest.mark.more
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant: Mutant, record_property: Callable[[str, object], None]) -> None:
    """Mutation analysis (DeMillo, Lipton & Sayward 1978): checks that pass every mutant would check nothing."""
    caught = catch(mutant, range(mutant.first, mutant.first + MOST))
    assert caught is not None, f"{mutant.name} ({mutant.breaks}) passes {MOST} schedules"
    assert not caught.promise.startswith("raises"), f"{mutant.name} no longer fits the machine: {caught.text}"
    record_property("schedules", caught.count)
    print(f"{mutant.name}: caught by {caught.promise!r} after {caught.count} schedules")
