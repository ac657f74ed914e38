"""Norms of weights as own training has made them, by which merges are bounded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dimat.errors import DimatError, MergeError
from dimat.merge.growth import Reference
from dimat.merge.natures import natures_of
from dimat.merge.pipeline import LARGE
from dimat.merge.screen import norm_of, norms_of, screen
from dimat.merge.stages import Weights
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

    def unfit(self, peer: str, weights: Weights, options: Mapping[str, Any]) -> str:
        """Return why a peer's weights do not pass the screen, whose `options` are given, or an empty string."""
        own = self._trainer.weights(copy=False)
        natures = natures_of(own, self._trainer.model)
        try:
            screen(own, weights, peer, norm_of(own, natures), natures, self.reference(), **options)
        except DimatError as error:
            return str(error)
        return ""

    def not_finite(self, weights: Weights) -> str:
        """Return which weights of the agent's own, from a checkpoint, are not finite; "" where nothing is bounded."""
        if not self._used:
            return ""
        try:
            norms_of(weights, natures_of(weights, self._trainer.model))
        except MergeError as error:
            return str(error)
        return ""
