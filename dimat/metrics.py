"""Which way a metric is better, by its name: a loss or a perplexity is if it is lower.

The module is on the lowest floor because the round machine, the merge's judge, the simulator and the reports all need
it, and nothing but the name travels with a metric.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

LOWER = frozenset({"loss", "nll", "perplexity", "ppl", "error", "mse", "rmse", "mae", "wer", "cer", "bpb", "bpc"})
"""Last words of names of metrics that are lower where they are better."""


def lower_is_better(metric: str) -> bool:
    """Whether a metric is lower where it is better: "perplexity", "eval_loss", "test/WER"; any other is higher."""
    return re.split(r"[^a-z0-9]+", metric.lower())[-1] in LOWER


def score_of(metric: str, value: float) -> float:
    """Return a metric's value as a score, which is higher where it is better: the value, or its negative."""
    return -value if lower_is_better(metric) else value


def best_of(metric: str, values: Sequence[float]) -> float:
    """Return the best of some values of a metric; NaN of none."""
    return max(values, key=lambda value: score_of(metric, value), default=math.nan)


def within(metric: str, best: float, share: float = 0.9) -> float:
    """Return the value of a metric that is `share` in (0, 1] of the best one: an accuracy of .9 · best, a perplexity of
    best / .9. Values below 0 go the other way: a mean log-likelihood of best / .9."""
    return best * share if (best >= 0) != lower_is_better(metric) else best / share
