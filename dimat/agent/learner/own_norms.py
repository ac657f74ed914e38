"""Norms of weights as own training has made them, by which merges are bounded."""

from __future__ import annotations

from collections.abc import Mapping

from dimat.errors import MergeError
from dimat.merge.growth import Reference
from dimat.merge.natures import natures_of
from dimat.merge.pipeline import LARGE
from dimat.merge.screen import norms_of
from dimat.train.base import ModelTrainer


class OwnNorms:
    """The norms of the trainer's weights. `used`: if false nothing is bounded by them."""

    def __init__(self, trainer: ModelTrainer, *, used: bool) -> None:
        self._trainer = trainer
        self._used = used
        self.norms: dict[str, float] = {}
        """By tensor, those that own training has made; empty before the first."""

    def now(self) -> dict[str, float]:
        """Return the norms of the current weights; nothing where they are not finite, which the merge says."""
        own = self._trainer.model.state_dict()
        try:
            return norms_of(own, natures_of(own, self._trainer.model))
        except MergeError:
            return {}

    def begin(self) -> None:
        """Take the current weights as made by own training: they are another agent's, taken over whole."""
        self.norms = self.now()

    def reference(self) -> Reference | None:
        """Return what merges are bounded by, None before the first training."""
        if not self.norms or not self._used:
            return None
        own = self._trainer.model.state_dict()
        return Reference.of(self.norms, own, natures_of(own, self._trainer.model))

    def after_training(self, before: Mapping[str, float]) -> None:
        """Let the reference follow what a round's training has made of norms, `before` given."""
        reference, after = self.reference(), self.now()
        if reference is not None and after:
            self.norms = reference.after_training(before, after)
        elif reference is None:
            self.norms = after

    def are_usual(self) -> bool:
        """Tell whether the current weights are no larger than usual."""
        reference = self.reference()
        return reference is None or reference.excess(self.now())[0] <= LARGE
