"""The context of a merge: model, data and statistics that its stages need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dimat.errors import MergeError
from dimat.merge.growth import Reference
from dimat.merge.stages import Data, Inputs, Points, Score, Weights
from dimat.symmetry import Observer
from dimat.symmetry.spec import SymmetrySpec


@dataclass
class MergeContext:
    """Model, data and whatever else a merge rests on; may be kept from merge to merge.

    `model` gives the architecture (its weights do not matter and are not changed), `spec` its symmetry groups,
    `data` batches of its inputs, to be iterated more than once. `score` judges weights (higher is better), for
    accept rules. `base`: the weights that task vectors are taken from; `aux`: by peer name, statistics that came
    with its snapshot, own's under "" (see shared_statistics.py; combine methods get them in the order own, peers);
    `state`: what a method carries from merge to merge. `reference`: the norms that own training has made, which bound
    what the merge makes of them; `judge`: a score for merges with peers whose weights are unusually large by it.
    `beside` checks what else came with the snapshot of a peer, given its name, and raises PeerError for what cannot be.
    `points` pins where groups are observed. Keep one context per model, or its `observer_cache`: tracing a model takes
    seconds.
    """

    model: nn.Module | None = None
    spec: SymmetrySpec | None = None
    data: Data | None = None
    score: Score | None = None
    base: Weights | None = None
    aux: Mapping[str, Weights] | None = None
    generator: torch.Generator | None = None
    state: dict[str, Any] | None = None
    points: Points | None = None
    reference: Reference | None = None
    judge: Score | None = None
    beside: Callable[[str], None] | None = None
    observer_cache: dict[str, Observer] = field(default_factory=dict[str, Observer], repr=False)

    def observer(self, inputs: Inputs) -> Observer:
        """Return an observer of the model, traced on `inputs` when it is first asked for."""
        if self.model is None or self.spec is None:
            raise MergeError("aligning by activations needs the model and its symmetry spec: pass both")
        if self.spec.arch_hash not in self.observer_cache:
            self.observer_cache[self.spec.arch_hash] = Observer(self.model, self.spec, inputs)
        return self.observer_cache[self.spec.arch_hash]

    def offered(self) -> dict[str, Any]:
        """Return what a method may ask for by keyword."""
        names = (
            "model",
            "spec",
            "data",
            "score",
            "base",
            "aux",
            "generator",
            "state",
            "points",
            "observer",
            "reference",
        )
        return {name: getattr(self, name) for name in names}
