"""How far agents' class shares lie apart, and the threshold for advising an exact average.

It turns plain counts into one number, which the report, the doctor and the advisor all use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

FAR_APART = 0.5
"""Mean total variation between agents' class shares and those of all from which on an exact average is advised.

At 0.4 (Dirichlet 0.5, ten classes) three mixing steps instead of one, on a ring of five, gained as much as seeds differ
by (.456 to .473, CIFAR-10 at 16×16); at 0.7 and 0.8 (Dirichlet 0.1, two classes each) they gained .06. An average of
few neighbours then lacks whole classes.
"""


def class_distance(histogram: Mapping[str, Sequence[int]]) -> float | None:
    """Return the mean over agents of the total variation between their class shares and those of all, in [0, 1].

    `histogram`: samples by class of each agent. None if it is undefined: for one agent, or without classes.
    Agents without samples are left out.
    """
    held = [counts for counts in histogram.values() if sum(counts) > 0]
    classes = max((len(counts) for counts in held), default=0)
    if len(held) < 2 or classes < 2:
        return None
    rows = [[*counts, *[0] * (classes - len(counts))] for counts in held]
    whole = _shares([sum(column) for column in zip(*rows, strict=True)])
    apart = [sum(abs(a - b) for a, b in zip(_shares(row), whole, strict=True)) / 2 for row in rows]
    return sum(apart) / len(apart)


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts)
    return [count / total for count in counts]
