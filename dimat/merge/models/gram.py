"""Gram matrices of linear layers' inputs, for RegMean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dimat.errors import MergeError
from dimat.merge.models.batches import device_of, on_device, take
from dimat.merge.models.functional import call_with, reading_inputs, tensors_for
from dimat.merge.shared_statistics import GRAM, Examples
from dimat.merge.stages import Data, Inputs, Weights

MOST_NUMBERS = 1.5
"""Numbers of Gram matrices to one parameter, up to which agents merge by RegMean unasked. The networks for which it was
measured have 0.1 to 1.4 (benchmarks/default_combine.py); most transformers have more."""


def pays(model: nn.Module, inputs: Inputs) -> bool:
    """Whether agents merge a model by RegMean unless they are told otherwise: it has linear layers that are called as
    modules on some `inputs`, none of which shares its weight with another module, and their Gram matrices are not much
    larger than the model."""
    homes = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    numbers, parameters = sum(module.in_features**2 for module in linear), sum(p.numel() for p in model.parameters())
    if not 0 < numbers <= MOST_NUMBERS * parameters or any(homes[id(module.weight)] > 1 for module in linear):
        return False
    return bool(gram_matrices(model, [inputs]))


def gram_matrices(
    model: nn.Module, data: Data, weights: Weights | None = None, *, max_examples: int | None = None
) -> dict[str, Tensor]:
    """Return G = (1/N) Σ_n x_n x_nᵀ over the inputs of each linear layer: {"gram.<weight>": (in, in)}, float32.

    `data`: batches of the model's arguments. N counts rows: every position of every example. Sums are in float64.
    `weights`: at which to run, the model's own if None. The model runs in evaluation mode and is left as it was. A
    layer that is never called as a module (the projections of torch's attention) has none. A layer that runs several
    times collects all its inputs, under each of its names. Raises MergeError if there are no data or the inputs of a
    layer are not finite.

    Paper: Jin et al., ICLR 2023, arXiv 2212.09849.
    """
    device = device_of(model)
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            names.setdefault(module, []).append(f"{GRAM}{name}.weight" if name else f"{GRAM}weight")

    def reader(key: str) -> Callable[[Tensor], None]:
        def read(inputs: Tensor) -> None:
            x = inputs.flatten(0, -2)
            x = x.cpu().double() if x.device.type == "mps" else x.double()
            product = (x.mT @ x).cpu()
            sums[key] = sums[key] + product if key in sums else product
            rows[key] = rows.get(key, 0) + x.shape[0]

        return read

    tensors = tensors_for(model, dict(model.state_dict() if weights is None else weights), device)
    with reading_inputs(model, {module: reader(keys[0]) for module, keys in names.items()}):
        read = False
        for inputs in take(data, max_examples):
            call_with(model, tensors, on_device(inputs, device))
            read = True
    if names and not read:
        raise MergeError("there are no data for Gram matrices: pass at least one batch of model inputs")
    for key, total in sums.items():
        if not total.isfinite().all():
            raise MergeError(f"the inputs of {key.removeprefix(GRAM)!r} are not finite: are the weights and data?")
    return {key: (sums[keys[0]] / rows[keys[0]]).float() for keys in names.values() if keys[0] in sums for key in keys}


def gram_of_examples(
    model: nn.Module, examples: Examples, *, loss: Callable[[Any, Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Return `gram_matrices` as agents take them; targets and loss are not used."""
    return gram_matrices(model, (inputs for inputs, _ in examples))
