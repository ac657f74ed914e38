"""An agent's optimizer moments: sent beside its weights, bounded, merged, adopted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dimat.config import ExperimentConfig
from dimat.merge import MergeOutcome, MergePlan
from dimat.merge.moments import (
    MergedMoments,
    PeerMoments,
    check_moments,
    decoded_moments,
    norms_of_moments,
    reference_of,
)
from dimat.merge.natures import natures_of
from dimat.merge.stages import Weights
from dimat.symmetry import SymmetrySpec
from dimat.train.base import ModelTrainer
from dimat.train.moments import kept_back, sample_moments
from dimat.train.optimizer_state import family
from dimat.train.optimizers import build_optimizer
from dimat.weights.moments import encode_moments


class SharedMoments:
    """The moments of one agent's optimizer in `train.optimizer_state = "merged"`.

    `encoding`: in which they are sent; `plan`: of the merges, which bounds peers' moments and may hold layers back;
    `used`: if false they stay the agent's own: none are sent, expected or changed; `norms`: their norms after own
    training, empty before the first.
    """

    def __init__(self, trainer: ModelTrainer, encoding: str, plan: MergePlan, *, used: bool = True) -> None:
        self._trainer = trainer
        self._encoding = encoding
        self._plan = plan
        self._told = False
        self.used = used
        self.norms: dict[str, float] = {}

    def encoded(self) -> dict[str, Tensor]:
        """Return the encoded tensors of the moments, by names without `aux.`."""
        return encode_moments(self._trainer.moments(), self._encoding) if self.used else {}

    def norms_now(self) -> dict[str, float]:
        """Return the current norms of the moments."""
        return norms_of_moments(self._trainer.moments()) if self.used else {}

    def restore(self, norms: Mapping[str, float]) -> None:
        """Continue with the norms of a checkpoint; one of an older version has none."""
        self.norms = dict(norms) or self.norms_now() if self.used else {}

    def after_training(self, before: Mapping[str, float]) -> tuple[str, ...]:
        """Let the reference follow the change of norms in training, from `before`; return notes for people."""
        if not self.used:
            return ()
        own = self._trainer.moments()
        after = norms_of_moments(own)
        followed = reference_of(self.norms, own).after_training(before, after)
        self.norms = {**after, **followed}
        if self._told or not after:
            return ()
        self._told = True
        kind = type(self._trainer.optimizer).__name__
        held = kept_back(self._trainer.model, self._trainer.optimizers())
        if not held:
            return ()
        return (
            f'train.optimizer_state = "merged": {", ".join(held)} of {kind} do not have their parameters\' shapes; '
            "they are not sent, and stay each agent's own",
        )

    def check(self, peer: str, tensors: Weights) -> None:
        """Check the moments sent with a peer's weights; raises PeerError with the fault."""
        if not self.used:
            return
        check_moments(peer, tensors, self._trainer.model.state_dict(), self._trainer.moments())

    def checks(self, came: Mapping[str, Weights]) -> Callable[[str], None]:
        """Return a function that checks a peer's moments, by its name. `came`: by peer, tensors sent with weights."""
        return lambda peer: self.check(peer, came.get(peer, {}))

    def merge(self, outcome: MergeOutcome, came: Mapping[str, Weights], spec: SymmetrySpec | None) -> tuple[str, ...]:
        """Merge own moments with those of the peers that were in a merge of weights; return notes for people.

        `came`: by peer, the tensors sent with its weights.
        """
        if not self.used:
            return ()
        own, model = self._trainer.moments(), self._trainer.model
        weights = model.state_dict()
        peers = [
            PeerMoments(name, weight, came.get(name, {}), outcome.permutations.get(name, {}))
            for name, weight in outcome.mixing.items()
            if weight > 0
        ]
        merged = MergedMoments(
            own,
            outcome.own_weight,
            peers,
            spec,
            reference_of(self.norms, own),
            ratio=self._plan.most,
            limit=self._trainer.momentum_limit(),
            share=outcome.accepted,
            factors=self._plan.factors(weights, natures_of(weights, model)),
        )
        self._trainer.load_moments(merged)
        return tuple(
            f"{peer}: its optimizer's moments are up to {factor:.3g} times as large as this agent's own have "
            f"become in training; they count as {self._plan.most:g} times"
            for peer, factor in merged.exceeded.items()
        )

    def adopt(self, tensors: Weights) -> str:
        """Continue with another agent's moments, which have been checked; return a remark for people, or ""."""
        if not self.used:
            return ""
        anew = self._trainer.adopt_moments(decoded_moments(tensors))
        self.norms = self.norms_now()
        if not anew:
            return ""
        more = f" and {len(anew) - 3} more" if len(anew) > 3 else ""
        return f"the optimizer's state is reset for {', '.join(anew[:3])}{more}: it has state that is not exchanged"


def sample_encoded(
    config: ExperimentConfig, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = ()
) -> Weights:
    """Return tensors of the names, shapes and types in which moments will be sent; none if they are not merged.

    `optimizers`: the model's; that of the configuration where none is given.
    """
    if config.optimizer_state != "merged":
        return {}
    if not optimizers:
        folder = Path(config.folder)
        made = build_optimizer(model, config.train.optimizer, precision=config.train.precision, folder=folder)
        optimizers = family(made)
    return encode_moments(sample_moments(model, optimizers), config.exchange.moments)
