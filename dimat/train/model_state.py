"""A model and its optimizer as named tensors: read, replaced and permuted in place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from dimat.errors import DataError
from dimat.symmetry import Permutations, SymmetrySpec, permute_optimizer, permute_weights
from dimat.symmetry.trace import forget_derived


class ModelState(ABC):
    """The weights of `model` and the state of `optimizer`, in dimat's own trainer or a user's loop."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def weights(self) -> dict[str, Tensor]:
        """Return copies of all parameters and buffers, on the CPU."""
        return {name: copied(tensor) for name, tensor in self.model.state_dict().items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over parameters and buffers in place; the optimizer's state stays. DataError where they do not fit."""
        own = self.model.state_dict(keep_vars=True)
        check_fit(own, weights, "weights")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(weights[name])
        forget_derived(self.model)

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Take over another agent's weights whole, with an optimizer that knows nothing of before. DataError where
        they do not fit."""
        self.load_weights(weights)
        self.optimizer = self._new_optimizer()

    def permute(self, spec: SymmetrySpec, permutations: Permutations) -> None:
        """Move model and optimizer state into another basis: unit j becomes what unit p[j] was.

        Raises SymmetryError where a permutation does not fit; nothing is changed then.
        """
        own = self.model.state_dict()
        moved = permute_weights(own, spec, permutations)
        trained = [name for name, _ in self._optimized()]
        moments = permute_optimizer(self.optimizer.state_dict(), spec, permutations, trained)
        with torch.no_grad():
            for name, tensor in own.items():
                if moved[name] is not tensor:
                    tensor.copy_(moved[name])
        forget_derived(self.model)
        self.optimizer.load_state_dict(moments)

    def optimizer_entries(self) -> dict[str, dict[str, Any]]:
        """Return the optimizer's state by parameter name, without entries that are None."""
        entries: dict[str, dict[str, Any]] = {}
        for name, parameter in self.model.named_parameters():
            held = cast("dict[str, Any]", self.optimizer.state.get(parameter, {}))
            if held:
                entries[name] = {key: value for key, value in held.items() if value is not None}
        return entries

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the optimizer's state from tensors named `optimizer/<parameter>/<entry>`.

        Raises DataError for an unknown parameter or a shape that does not fit.
        """
        trained = dict(self._optimized())
        names = list(trained)
        held: dict[int, dict[str, Tensor]] = {}
        for full, tensor in tensors.items():
            name, _, key = full.removeprefix("optimizer/").rpartition("/")
            if name not in names:
                raise DataError(f"the state has optimizer entries of {name!r}, which is no trained parameter here")
            if tensor.ndim and tensor.shape != trained[name].shape:
                raise DataError(f"{full} has shape {tuple(tensor.shape)}, {name} {tuple(trained[name].shape)}")
            held.setdefault(names.index(name), {})[key] = tensor.clone()
        self.optimizer = self._new_optimizer()
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": held})

    def _optimized(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters that the optimizer changes, by name, in its order."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    @abstractmethod
    def _new_optimizer(self) -> torch.optim.Optimizer:
        """Return an optimizer that knows nothing of before."""


def copied(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


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
