"""The steps of a learner's round, as a driver has it make them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dimat.agent.learner.learner import Learner
from dimat.agent.protocol.messages import MergeAction, MergePart
from dimat.events import MergeResult
from dimat.weights.snapshot import RecordedSnapshot


def trained(learner: Learner, number: int, *, learn: bool) -> RecordedSnapshot:
    """Train for a round (or only begin it), and record."""
    learner.train(number, learn)
    return learner.record()


def merged(
    learner: Learner, number: int, own: float, parts: Sequence[tuple[str, Path, float, bool]], evaluate: str
) -> MergeResult:
    """Merge snapshots, given as (peer, file, weight, same basis)."""
    asked = tuple(MergePart(peer, number, file.stem, weight, same) for peer, file, weight, same in parts)
    return learner.merge(MergeAction(number, own, asked), {peer: file for peer, file, *_ in parts}, evaluate)
