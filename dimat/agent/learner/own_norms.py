"""Norms of an agent's weights after its own training, by which merges are bounded."""

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
    """The norms of the trainer's weights. `used`: if false they bound nothing."""

    def __init__(self, trainer: ModelTrainer, *, used: bool) -> None:
        self._trainer = trainer
        self._used = used
        self.norms: dict[str, float] = {}
        """By tensor, those that own training has made; empty before the first."""

    def now(self) -> dict[str, float]:
        """Return the norms of the current weights; nothing if they are not finite, which the merge reports."""
        own = self._trainer.model.state_dict()
        try:
            return norms_of(own, natures_of(own, self._trainer.model))
        except MergeError:
            return {}

    def begin(self) -> None:
        """Treat the current weights as if own training had made them: another agent's, just adopted."""
        self.norms = self.now()

    def reference(self) -> Reference | None:
        """Return the bound on merges, None before the first training."""
        if not self.norms or not self._used:
            return None
        own = self._trainer.model.state_dict()
        return Reference.of(self.norms, own, natures_of(own, self._trainer.model))

    def after_training(self, before: Mapping[str, float]) -> None:
        """Let the reference follow the change of norms in a round's training, from `before`."""
        reference, after = self.reference(), self.now()
        if reference is not None and after:
            self.norms = reference.after_training(before, after)
        elif reference is None:
            self.norms = after

    def are_usual(self) -> bool:
        """Return whether the current weights are no larger than usual."""
        reference = self.reference()
        return reference is None or reference.excess(self.now())[0] <= LARGE

    def unfit(self, peer: str, weights: Weights, options: Mapping[str, Any]) -> str:
        """Return why a peer's weights do not pass the screen with these `options`, or an empty string."""
        own = self._trainer.weights(copy=False)
        natures = natures_of(own, self._trainer.model)
        try:
            screen(own, weights, peer, norm_of(own, natures), natures, self.reference(), **options)
        except DimatError as error:
            return str(error)
        return ""

    def not_finite(self, weights: Weights) -> str:
        """Return which of the agent's own weights, from a checkpoint, are not finite; "" if norms bound nothing."""
        if not self._used:
            return ""
        try:
            norms_of(weights, natures_of(weights, self._trainer.model))
        except MergeError as error:
            return str(error)
        return ""
