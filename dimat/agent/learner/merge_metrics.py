"""Test metrics around a merge: before it, after it, and whether it has made them not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import isfinite, nan

import torch
from torch import Tensor

from dimat.events import WARNING
from dimat.merge import MergeOutcome
from dimat.merge.pipeline import NOT_KEPT
from dimat.merge.stages import Weights
from dimat.tasks.base import Data
from dimat.tasks.data import Subset
from dimat.train import Trainer
from dimat.train.base import ModelTrainer

FEW = 8
"""Examples on which a merge is looked at where no metrics are taken after it."""


class MergeMetrics:
    """The metrics of one merge, empty if they are not asked for.

    `evaluate`: gives those of the current weights, or of others; `asked`: "all" (before and after), "after" or "none";
    `first`, `last`: whether the merge is the first or the last of its round, before and after which metrics are taken.
    """

    def __init__(
        self, evaluate: Callable[[Weights | None], dict[str, float]], asked: str, *, first: bool, last: bool
    ) -> None:
        self._evaluate = evaluate
        self._with_before = asked == "all" and first
        self._with_after = asked != "none" and last
        self.before: Mapping[str, float] = {}
        self.after: Mapping[str, float] = {}

    def take_before(self, former: Weights | None) -> None:
        """Evaluate before the merge; `former`: the agent's own weights, if it has adopted others since."""
        if self._with_before:
            self.before = self._evaluate(former)

    def take_after(self, *, changed: bool) -> None:
        """Evaluate after the merge; computes nothing again if the merge has not `changed` the weights."""
        if self._with_after:
            self.after = self._evaluate(None) if changed or not self.before else self.before

    def keep_if_finite(
        self, outcome: MergeOutcome, held: dict[str, Tensor], trainer: ModelTrainer, own: Data
    ) -> MergeOutcome:
        """Put the agent's own weights (`held`) back into the trainer if the merge has made metrics not finite.

        Where none are taken after this merge, a few of the agent's own examples are looked at; not where a user's own
        loop trains, who alone knows how to judge. Return the outcome after that.
        """
        if not outcome.changes:
            return outcome
        looks = not self.after and isinstance(trainer, Trainer) and len(own) > 0
        few = Subset(own, torch.arange(min(FEW, len(own)))) if looks else None
        # on a few examples a ratio may be 0/0: there only the loss is looked at
        after = self.after if few is None else {"loss": trainer.evaluate(few).get("loss", 0.0)}
        lost = [name for name, value in after.items() if not isfinite(value)]
        if not lost:
            return outcome
        trainer.exchange_weights(held)
        if few is None:
            self.before = self.before or self._evaluate(None)
        before = self.before if few is None else trainer.evaluate(few)
        if not any(isfinite(before.get(name, nan)) for name in lost):
            trainer.exchange_weights(held)  # they were not finite before, so the merge is not to blame
            return outcome
        self.after = self.after and self.before
        note = f"{WARNING}after the merge {' and '.join(lost)} is not finite: {NOT_KEPT}"
        return replace(outcome, accepted=0.0, notes=(*outcome.notes, note))
