"""The empirical diagonal Fisher information of a model, for Fisher-weighted merging."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap  # pyright: ignore[reportPrivateImportUsage, reportUnknownVariableType]

from dimat.errors import MergeError
from dimat.merge.models.batches import device_of
from dimat.merge.models.functional import aliases, call_with
from dimat.merge.shared_statistics import FISHER
from dimat.merge.stages import Weights
from dimat.symmetry.trace import eval_mode, forget_derived

Loss = Callable[[Any, Tensor], Tensor]
"""(model output, labels), each of a batch of one → the example's loss, −log p(y | x), a scalar."""


def empirical_fisher(
    model: nn.Module,
    batches: Iterable[tuple[Tensor | Sequence[Tensor], Tensor]],
    weights: Weights | None = None,
    loss: Loss = nn.functional.cross_entropy,
    *,
    max_examples: int | None = None,
    chunk: int = 16,
) -> dict[str, Tensor]:
    """Return F[i] = (1/N) Σ_n (∂ℓ(x_n, y_n)/∂θ[i])² of each parameter: {"fisher.<parameter>": its shape}, float32.

    `batches`: pairs of inputs (a tensor, or the model's arguments) and labels, examples along dim 0. `weights`: at
    which to take it, the model's own if None. `chunk` examples are differentiated at a time, each separately; the
    squares are summed in float64. The model runs in evaluation mode and is left as it was. Tied parameters have one
    entry for each name. Gradients of data labels, not of labels drawn from the model ("empirical"). Raises MergeError
    if there are no examples or a gradient is not finite.

    Paper: Matena, Raffel, NeurIPS 2022, arXiv 2111.09832; Kunstner et al., NeurIPS 2019, arXiv 1905.12558, on
    what the empirical Fisher is and is not.
    """
    device = device_of(model)
    given = dict(model.state_dict() if weights is None else weights)
    parameters = {name: given[name].detach().to(device) for name, _ in model.named_parameters()}
    buffers = {name: given.get(name, buffer).detach().to(device, copy=True) for name, buffer in model.named_buffers()}
    wide = torch.float32 if device.type == "mps" else torch.float64
    sums = {name: torch.zeros_like(p, dtype=wide) for name, p in parameters.items()}

    def example_loss(tensors: dict[str, Tensor], inputs: tuple[Tensor, ...], label: Tensor) -> Tensor:
        output = call_with(model, {**buffers, **tensors}, [x[None] for x in inputs])
        return loss(output, label[None]).sum()

    per_example: Any = vmap(grad(example_loss), in_dims=(None, 0, 0), chunk_size=chunk)
    seen = 0
    with eval_mode(model):
        for inputs, labels in batches:
            room = len(labels) if max_examples is None else min(len(labels), max_examples - seen)
            if room <= 0:
                break
            arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
            for first in range(0, room, chunk):
                part = slice(first, min(first + chunk, room))
                forget_derived(model)  # what was derived for a chunk belongs to its derivatives
                gradients = per_example(
                    parameters, tuple(x[part].to(device) for x in arguments), labels[part].to(device)
                )
                for name, gradient in gradients.items():
                    sums[name] += gradient.to(wide).square().sum(0)
            seen += room
    if not seen:
        raise MergeError("there are no examples for the Fisher information: pass at least one batch")
    diagonals = {name: (total / seen).float() for name, total in sums.items()}
    for name, diagonal in diagonals.items():
        if not diagonal.isfinite().all():
            raise MergeError(f"the Fisher information of {name!r} is not finite: are the weights and data?")
    return {FISHER + name: diagonals[first] for name, first in aliases(model).items() if first in diagonals}
