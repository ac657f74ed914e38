"""Running a model at other weights than its own, and leaving it as it was, whatever it shares inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call  # pyright: ignore[reportPrivateImportUsage]


def aliases(model: nn.Module) -> dict[str, str]:
    """Return, for every name of every parameter and buffer, the first name of the same tensor."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for listed in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in listed:
            names[name] = first.setdefault(id(tensor), name)
    return names


def call_with(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Any:
    """Return model(*inputs) at `tensors`, one for each first name (see `aliases`); the rest is the model's own.

    Each module's tensors are set once, under one of the module's names. torch's own tying does it once for each
    name, and then leaves a model in which one module stands in two places with the wrong tensors.
    """
    names = aliases(model)
    given: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():  # each module once
        own = [*module.named_parameters(recurse=False, remove_duplicate=False)]
        own += [*module.named_buffers(recurse=False, remove_duplicate=False)]
        for name, _ in own:
            whole = f"{prefix}.{name}" if prefix else name
            if names[whole] in tensors:
                given[whole] = tensors[names[whole]]
    return functional_call(model, given, tuple(inputs), tie_weights=False)
