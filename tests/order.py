"""The order of tests: those that wait stand evenly among those that compute, so that cores have work meanwhile.

xdist hands each worker a stretch of the list. By folder, whole stretches are of real agents that wait for each other,
and where two workers have such ones at once, a core has nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from itertools import groupby
from typing import TypeVar

T = TypeVar("T")
LAST = 0.85
"""By this share of the list the last file that waits begins: at the end nothing is left to do beside it."""


def spread(tests: Iterable[T], file: Callable[[T], Hashable], waits: Callable[[T], bool]) -> list[T]:
    """Return tests in another order: files that have tests that wait are spread evenly among the others.

    `file`: the file of a test; neighbours of one file stay together and in their order, as they share fixtures. Files
    of a kind stay in their order. Deterministic, as all workers must have the same order.
    """
    files = [list(group) for _, group in groupby(tests, file)]
    kinds = [any(map(waits, group)) for group in files]
    totals = {kind: sum(len(group) for group, each in zip(files, kinds) if each == kind) for kind in (False, True)}
    before = {False: 0, True: 0}
    placed: list[tuple[float, int]] = []
    for number, (group, kind) in enumerate(zip(files, kinds)):
        share = before[kind] / totals[kind]
        placed.append((share * LAST if kind else share, number))
        before[kind] += len(group)
    return [test for _, number in sorted(placed) for test in files[number]]
