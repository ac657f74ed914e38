"""Runs a model at other weights than its own, and leaves it as it was."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call  # pyright: ignore[reportPrivateImportUsage]

from dimat.merge.stages import Weights
from dimat.symmetry.trace import eval_mode


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

    Each module's tensors are set once, under one of the module's names. torch's own tying sets them once for each name,
    and then leaves a model that uses one module in two places with the wrong tensors.
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


def tensors_for(model: nn.Module, weights: Weights, device: torch.device) -> dict[str, Tensor]:
    """Return copies of the weights on a device, in the model's own types, one for each first name: for `call_with`.

    The types are those of the model's parameters, whatever the types of the stored weights.
    """
    types = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    tensors: dict[str, Tensor] = {}
    for name, first in aliases(model).items():
        if name in weights and first not in tensors:
            tensors[first] = weights[name].detach().to(device, types[first], copy=True)
    return tensors


@contextmanager
def reading_inputs(model: nn.Module, readers: Mapping[nn.Module, Callable[[Tensor], None]]) -> Generator[None]:
    """Context in which the model is in evaluation mode without gradients, and each of these modules passes its first
    input to its reader whenever it runs. Afterwards the model is as it was."""

    def hook(read: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda _, inputs, named: read((inputs[0] if inputs else named["input"]).detach())

    handles = [module.register_forward_pre_hook(hook(read), with_kwargs=True) for module, read in readers.items()]
    try:
        with eval_mode(model), torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
