"""A model and its optimizer as named tensors: read, replaced and permuted in place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy  # pyright: ignore[reportUnknownVariableType]

from dimat.errors import ConfigError, DataError
from dimat.symmetry import Permutations, SymmetrySpec, permute_weights
from dimat.symmetry.trace import forget_derived
from dimat.train.moments import adopt_moments, limit_of_momenta, read_moments, write_moments
from dimat.train.optimizer_state import (
    PREFIX,
    copied,
    family,
    group_values,
    move,
    on_cpu,
    optimized,
    read_state,
    write_state,
)


class ModelState(ABC):
    """The weights of `model` and the state of `optimizer`, in dimat's own trainer or a user's loop."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    _began: list[list[dict[str, Any]]]
    """Initial values of each optimizer's groups."""

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return all optimizers whose state belongs to the model, always in the same order."""
        return family(self.optimizer)

    def weights(self, *, copy: bool = True) -> dict[str, Tensor]:
        """Return all parameters and buffers, on the CPU: copies, or with `copy` false the model's own tensors if they
        are there, which change with the model."""
        take = copied if copy else on_cpu
        return {name: take(tensor) for name, tensor in self.model.state_dict().items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights into parameters and buffers in place; the optimizer's state is kept. DataError if names or
        shapes differ."""
        own = self.model.state_dict(keep_vars=True)
        check_fit(own, weights, "weights")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(weights[name])
        forget_derived(self.model)

    def exchange_weights(self, weights: dict[str, Tensor]) -> None:
        """Exchange parameters and buffers with `weights`, which then holds the earlier ones.

        One tensor at a time, so that a merge that is not kept can be undone without a second copy of the model. Where
        tensors share memory, all are copied first.
        """
        own = self.model.state_dict(keep_vars=True)
        check_fit(own, weights, "weights")
        if len({tensor.untyped_storage().data_ptr() for tensor in own.values()}) < len(own):
            before = self.weights()
            self.load_weights(weights)
            weights.update(before)
            return
        with torch.no_grad():
            for name, tensor in own.items():
                former = copied(tensor)
                tensor.copy_(weights[name])
                weights[name] = former
        forget_derived(self.model)

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Adopt all of another agent's weights, with a new optimizer state. DataError if names or shapes differ."""
        self.load_weights(weights)
        self._renew_optimizer()

    def permute(self, spec: SymmetrySpec, permutations: Permutations) -> str:
        """Move model, gradients and optimizer state into another basis: unit j becomes what unit p[j] was.

        Returns a note for the operator, or "". Raises SymmetryError if a permutation does not fit; nothing is changed
        then.
        """
        own = self.model.state_dict()
        moved = permute_weights(own, spec, permutations)
        gradients = self._gradients(spec)
        moved_gradients = permute_weights(gradients, spec, permutations, strict=False)
        moving = [move(each, optimized(self.model, each), spec, permutations) for each in self.optimizers()]
        with torch.no_grad():
            for before, after in ((own, moved), (gradients, moved_gradients)):
                for name, tensor in before.items():
                    if after[name] is not tensor:
                        tensor.copy_(after[name])
            for move_optimizer, _ in moving:
                move_optimizer()
        forget_derived(self.model)
        return "; ".join(note for _, note in moving if note)

    def optimizer_state(self, *, copy: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the optimizers' state as tensors named `optimizer/<parameter>/<entry>`, and other values as text.
        ConfigError if it holds something that a checkpoint cannot store."""
        tensors: dict[str, Tensor] = {}
        texts: dict[str, str] = {}
        for number, each in enumerate(self.optimizers()):
            # one that an optimizer has made inside itself since then is as it was made
            began = self._began[number] if number < len(self._began) else group_values(each)
            found, said = read_state(each, optimized(self.model, each), began, number, copy=copy)
            tensors |= found
            texts |= said
        return tensors, texts

    def load_optimizer(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Load the optimizers' state from a trainer's tensors and values.

        Accepts everything that torch would load; DataError for an unknown parameter.
        """
        held = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
        self._renew_optimizer()
        for number, each in enumerate(self.optimizers()):
            write_state(each, optimized(self.model, each), held, values, number)

    def moments(self) -> dict[str, Tensor]:
        """Return the optimizers' moments and counts of steps as `<entry>.<parameter>`: their own tensors, which change
        with them (`dimat.train.moments`)."""
        return read_moments(self.model, self.optimizers())

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Load moments in place, one tensor after the other; each of the optimizers' moments must be there."""
        with torch.no_grad():
            write_moments(self.model, self.optimizers(), moments)

    def adopt_moments(self, moments: Mapping[str, Tensor]) -> list[str]:
        """Let new optimizers continue with another agent's moments.

        Return the parameters for which they cannot.
        """
        with torch.no_grad():
            return adopt_moments(self.model, self.optimizers(), moments)

    def momentum_limit(self) -> float:
        """Return the largest ratio of a first moment to the root of its second moment."""
        return limit_of_momenta(self.optimizers())

    def clear_optimizer(self) -> None:
        """Reset the optimizers' state."""
        for each in self.optimizers():
            each.state.clear()

    def optimized(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the optimizer changes, by name, in its order."""
        return optimized(self.model, self.optimizer)

    def _renew_optimizer(self) -> None:
        self.optimizer = self._new_optimizer()
        self._began = [group_values(each) for each in self.optimizers()]

    def _gradients(self, spec: SymmetrySpec) -> dict[str, Tensor]:
        named = dict(self.model.named_parameters())
        for stack in spec.stacks:  # its tensors may change places: what has no gradient yet may get another's
            members = [named[name] for name in stack.sources if name in named]
            if any(p.grad is not None for p in members):
                for p in members:
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return {name: p.grad for name, p in named.items() if p.grad is not None and p.grad.layout == torch.strided}

    @abstractmethod
    def _new_optimizer(self) -> torch.optim.Optimizer:
        """Return a new optimizer."""


def check_whole(model: nn.Module) -> None:
    """Raise ConfigError for a model that is wrapped, sharded or without values."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise ConfigError(
            f"the model is wrapped in {type(model).__name__}; one process trains an agent's model for now: "
            "take the model inside it, model.module, and leave the wrapper away"
        )
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ConfigError(
                f"{name or 'the model'} is sharded (FullyShardedDataParallel); one process trains an agent's model for "
                "now: leave the sharding away"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__):
            raise ConfigError(
                f"{name} is a DTensor, spread over processes; one process trains an agent's model for now: leave the "
                "sharding away"
            )
        if is_lazy(tensor):
            raise ConfigError(f"{name} has no shape yet (a lazy module); run the model once before it is passed on")
        if tensor.is_meta:
            raise ConfigError(f"{name} has no values (it is on the meta device); load the model before it is passed on")


def check_fit(own: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Raise DataError, naming `what`, unless both have the same names with the same shapes."""
    missing, extra = own.keys() - given.keys(), given.keys() - own.keys()
    if missing or extra:
        kind, names = ("lack", missing) if missing else ("hold the unknown", extra)
        raise DataError(f"{what} {kind} {', '.join(sorted(names)[:3])}")
    for name, tensor in own.items():
        if tensor.shape != given[name].shape:
            shapes = f"{tuple(given[name].shape)}, the model {tuple(tensor.shape)}"
            raise DataError(f"{what}: {name} has shape {shapes}")
