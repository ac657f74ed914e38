"""Opens peers' snapshots: weights, and the statistics and moments sent with them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dimat.merge import open_weights
from dimat.merge.moments import PREFIXES
from dimat.merge.shared_statistics import apart
from dimat.merge.stages import Weights


class Opened(NamedTuple):
    """A snapshot of which nothing is read yet. `statistics`, `moments`: empty if merges do not use them."""

    weights: Weights
    statistics: Weights
    moments: Weights


def open_snapshot(file: Path, own: Weights, *, statistics: bool, moments: bool) -> Opened:
    """Open a snapshot. `own`: own weights; `statistics`, `moments`: whether merges use them.

    If they do not, such tensors stay among the weights: unexpected tensors, which the screen refuses.
    """
    weights = open_weights(file)
    taken: Weights = {}
    came: Weights = {}
    if moments:
        weights, came = apart(weights, own, PREFIXES)
    if statistics:
        weights, taken = apart(weights, own)
    return Opened(weights, taken, came)
