"""Optimizer steps according to a training configuration: scaled, clipped, by closure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dimat.config import TrainConfig
from dimat.errors import ConfigError, TrainingError
from dimat.train.optimizers import needs_closure
from dimat.train.round_start import RoundStart

Backward = Callable[[], tuple[Tensor, float]]


class Stepper:
    """Makes the steps of one optimizer of `model`. `scaler`: of the loss, for fp16; `start`: of the current round,
    whose pull is added to the gradients.

    Raises ConfigError if the optimizer cannot train according to the configuration.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, scaler: torch.amp.GradScaler
    ) -> None:
        self._model = model
        self._optimizer: Any = optimizer
        self._config = config
        self._scaler = scaler
        self._rates = [float(group.get("lr", math.nan)) for group in optimizer.param_groups]
        self._by_closure = needs_closure(optimizer)
        self._first = True
        self.start = RoundStart()
        if self._by_closure and scaler.is_enabled():
            raise ConfigError(
                f"train.optimizer {config.optimizer.name!r} evaluates the loss in its own steps, which fp16 cannot "
                'scale; set train.precision = "bf16" or "fp32"'
            )

    def set_rates(self, factor: float) -> None:
        """Set each group's learning rate to its first one times a factor."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def step(self, backward: Backward) -> tuple[Tensor, float]:
        """Make a step; `backward` adds gradients, and returns the mean loss and its weight, and so does this.

        With weight 0 there is nothing to learn from, and no step is made. TrainingError if the optimizer does not
        accept the gradients.
        """
        if self._by_closure:
            return self._step_by_closure(backward)
        loss, weight = self._gradients(backward)
        if not weight:
            return loss, weight
        try:
            if self._scaler.is_enabled():
                self._scaler.step(self._optimizer)
                self._scaler.update()
            else:
                self._optimizer.step()
        except Exception as error:  # gradients that it does not take, or whatever a user's own class raises
            name, first = self._config.optimizer.name, (str(error).strip().splitlines() or [""])[0]
            raise TrainingError(f"train.optimizer {name!r} cannot make a step: {first}") from error
        return loss, weight

    def _step_by_closure(self, backward: Backward) -> tuple[Tensor, float]:
        """Let the optimizer evaluate the loss any number of times; the first one is returned."""
        evaluated: list[tuple[Tensor, float]] = []

        def closure() -> Tensor:
            evaluated.append(self._gradients(backward))
            return evaluated[-1][0] + self.start.pull(self._model)  # what the gradients are of

        self._optimizer.step(closure)
        return evaluated[0]

    def _gradients(self, backward: Backward) -> tuple[Tensor, float]:
        """Compute the gradients of one loss, and return it with its weight."""
        self._optimizer.zero_grad()
        loss, weight = backward()
        if not weight:
            return loss, weight
        if self._first:
            self._first = False
            self._look_at_gradients()
        if self._scaler.is_enabled():
            self._scaler.unscale_(self._optimizer)
        self.start.add_pull(self._model)
        if self._config.grad_clip_norm is not None:
            trained = [p for p in self._model.parameters() if p.requires_grad]
            nn.utils.clip_grad_norm_(trained, self._config.grad_clip_norm)
        return loss, weight

    def _look_at_gradients(self) -> None:
        """Turn off fused steps, which need dense gradients, if a model's first gradients are sparse."""
        named = self._model.named_parameters()
        sparse = [name for name, p in named if p.grad is not None and p.grad.layout != torch.strided]
        if not sparse:
            return
        for key in ("grad_clip_norm", "proximal"):
            if getattr(self._config, key):
                raise ConfigError(
                    f"train.{key}: gradients of {sparse[0]} are sparse, and torch cannot clip or pull those; leave it "
                    "out, or make the layer without sparse=True"
                )
        for group in self._optimizer.param_groups:
            if group.get("fused"):
                group["fused"] = False
