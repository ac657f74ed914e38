"""Peers' snapshots as an agent opens them: weights, and what travels beside them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dimat.merge import open_weights
from dimat.merge.moments import PREFIXES
from dimat.merge.shared_statistics import apart
from dimat.merge.stages import Weights


class Opened(NamedTuple):
    """A snapshot of which nothing is read yet. `statistics`, `moments`: empty where merges have no use for them."""

    weights: Weights
    statistics: Weights
    moments: Weights


def open_snapshot(file: Path, own: Weights, *, statistics: bool, moments: bool) -> Opened:
    """Open a snapshot. `own`: own weights; `statistics`, `moments`: whether merges rest on those, or merge them.

    Where they do not, such tensors stay among the weights: tensors too many, which the screen refuses.
    """
    weights = open_weights(file)
    taken: Weights = {}
    came: Weights = {}
    if moments:
        weights, came = apart(weights, own, PREFIXES)
    if statistics:
        weights, taken = apart(weights, own)
    return Opened(weights, taken, came)
