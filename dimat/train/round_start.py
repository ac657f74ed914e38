"""Copies of a round's first weights that its training needs: a teacher, an anchor.

The teacher is the whole model, for losses that learn from it. The anchor consists of the trained parameters: with
`train.proximal` = μ > 0 a step does not minimise the batch's mean loss F alone but (FedProx, Li et al. 2020, arXiv
1812.06127, eq. 2)

    F(θ) + μ/2 · Σ_p ‖θ_p − θ_p,start‖²,  p over the trained parameters, θ_start the weights when the round began.

Its gradient μ (θ − θ_start) is added once a step: to the sum of the gradients of a batch's parts, after fp16's
unscaling, and before `train.grad_clip_norm`. The optimizer sees the sum, so under Adam the pull is scaled like the
gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dimat.errors import DataError
from dimat.train.optimizer_state import copied

TEACHER, ANCHOR = "teacher/", "anchor/"
"""Prefixes of their names in a trainer's state."""


@dataclass(frozen=True, slots=True)
class RoundStart:
    """Weights at the start of a round, on the model's device; `teacher` and `anchor` are empty if not needed.

    `proximal`: μ, by which the anchor pulls.
    """

    teacher: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    anchor: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    proximal: float = 0.0

    @classmethod
    def of(cls, model: nn.Module, proximal: float, *, teaches: bool) -> RoundStart:
        """Return the start of a round that begins with the model's current weights."""
        whole = {name: tensor.clone() for name, tensor in model.state_dict().items()} if teaches else {}
        anchor = {name: p.detach().clone() for name, p in _trained(model).items()} if proximal else {}
        return cls(whole, anchor, proximal)

    @classmethod
    def load(
        cls, tensors: Mapping[str, Tensor], model: nn.Module, proximal: float, *, teaches: bool, number: int
    ) -> RoundStart:
        """Return the start of round `number` from a state of its middle; DataError if that round did not keep the
        required copies, or is of another model."""

        def held(prefix: str, asked: Mapping[str, Tensor]) -> dict[str, Tensor]:
            names = {name: prefix + name for name in asked}
            if any(kept not in tensors or tensors[kept].shape != asked[name].shape for name, kept in names.items()):
                raise DataError(
                    f"the state is of the middle of round {number}, which began without the copies that train.loss and "
                    "train.proximal need now (or with other weights to train)"
                )
            return {name: tensors[kept].to(asked[name].device) for name, kept in names.items()}

        teacher = held(TEACHER, model.state_dict() if teaches else {})
        return cls(teacher, held(ANCHOR, _trained(model) if proximal else {}), proximal)

    def tensors(self) -> dict[str, Tensor]:
        """Return its part of a trainer's state, copies on the CPU."""
        named = {TEACHER + n: t for n, t in self.teacher.items()} | {ANCHOR + n: t for n, t in self.anchor.items()}
        return {name: copied(tensor) for name, tensor in named.items()}

    def add_pull(self, model: nn.Module) -> None:
        """Add μ (θ − θ_start) to the gradients of the trained parameters; for one without gradient, it is the
        gradient."""
        for name, start in self.anchor.items():
            parameter = model.get_parameter(name)
            away = parameter.detach() - start
            if parameter.grad is None:
                parameter.grad = self.proximal * away
            else:
                parameter.grad.add_(away, alpha=self.proximal)

    def pull(self, model: nn.Module) -> Tensor | float:
        """Return μ/2 · Σ ‖θ − θ_start‖², a scalar on the model's device; 0 without an anchor."""
        squares = [(model.get_parameter(n).detach() - t).abs().square().sum() for n, t in self.anchor.items()]
        return self.proximal / 2 * torch.stack(squares).sum() if squares else 0.0


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
