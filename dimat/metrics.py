"""Which way a metric is better, by its name: a loss or a perplexity is if it is lower.

The module is on the lowest floor because the round machine, the merge's judge, the simulator and the reports all need
it, and nothing but the name travels with a metric.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

LOWER = frozenset(
    ("loss", "nll", "perplexity", "ppl", "error", "mse", "rmse", "mae", "mape", "wer", "cer", "bpb", "bpc", "entropy")
)
"""Last words of names of metrics that are lower where they are better."""

PER = re.compile(r"(?:^|[^a-z0-9])(?:bits|nats)[^a-z0-9]per[^a-z0-9]")
"""A code length per something, which is lower where it is better."""

NEGATED = frozenset({"neg", "negative", "minus"})
"""Words that turn a metric round: scikit-learn's neg_log_loss is higher where it is better."""

WITHOUT_MEANING = frozenset({"epoch", "step", "mean", "avg", "rate"})
"""Last words that say nothing of the direction: Lightning's val_loss_epoch, a word error rate."""


def lower_is_better(metric: str) -> bool:
    """Whether a metric is lower where it is better: "perplexity", "eval_loss", "test/WER"; any other is higher."""
    words = re.split(r"[^a-z0-9]+", metric.lower())
    while len(words) > 1 and words[-1] in WITHOUT_MEANING:
        words.pop()
    lower = words[-1] in LOWER or PER.search(metric.lower()) is not None
    return lower and NEGATED.isdisjoint(words)


def score_of(metric: str, value: float) -> float:
    """Return a metric's value as a score, which is higher where it is better: the value, or its negative."""
    return -value if lower_is_better(metric) else value


def best_of(metric: str, values: Sequence[float]) -> float:
    """Return the best of some values of a metric that are numbers; NaN of none."""
    numbers = [value for value in values if not math.isnan(value)]
    return max(numbers, key=lambda value: score_of(metric, value), default=math.nan)


def within(metric: str, best: float, share: float = 0.9) -> float:
    """Return the value of a metric that is `share` in (0, 1] of the best one: an accuracy of .9 · best, a perplexity of
    best / .9. Values below 0 go the other way: a mean log-likelihood of best / .9."""
    return best * share if (best >= 0) != lower_is_better(metric) else best / share
