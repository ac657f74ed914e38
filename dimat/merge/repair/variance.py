"""Repair without BatchNorm: units keep mean and deviation of the models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd  # pyright: ignore[reportPrivateUsage]
from torch.utils._pytree import tree_leaves

from dimat.device import own_streams, seeded_streams
from dimat.errors import MergeError
from dimat.merge.accept.no_worse import between
from dimat.merge.growth import Reference
from dimat.merge.models.batches import device_of, on_device, take
from dimat.merge.models.functional import call_with, tensors_for
from dimat.merge.registry import repair_registry
from dimat.merge.repair.batchnorm import Norm, batchnorm, running_statistics
from dimat.merge.stages import Data, Inputs, Repaired, Weights
from dimat.symmetry.trace import eval_mode

SIZE = 2.0
"""How many times as large as own training has made them a repair may make weights and biases."""

Layer = nn.Linear | _ConvNd
Correct = Callable[[Layer, Tensor], Tensor]


@dataclass(frozen=True)
class Units:
    """Mean and standard deviation of each unit of a layer, (units,) float64."""

    mean: Tensor
    deviation: Tensor


@repair_registry.register("variance", renews=running_statistics)
def variance(
    weights: Weights,
    *,
    model: nn.Module | None,
    data: Data | None,
    models: Sequence[Weights] | None = None,
    mixing: Sequence[float] | None = None,
    reference: Reference | None = None,
    max_images: Annotated[int, Field(ge=2)] = 256,
    bound: Annotated[float, Field(ge=1)] = 4.0,
    ridge: Annotated[float, Field(gt=0)] = 0.05,
) -> Repaired:
    """Return the weights with the outputs of linear and convolutional layers, unit by unit, at the interpolation of the
    models' own means and deviations, and BatchNorm re-estimated as `batchnorm` does by default.

    Averaged weights partly cancel, so that activations shrink from layer to layer. With m, s the mean and deviation of
    a unit of the merged network, and μ = Σ_k w_k μ_k, σ = Σ_k w_k σ_k of the models:

        z' = a z + c,  a = (σ + ρ) / (s + ρ) within [1/bound, bound],  c = μ − a m

    ρ is `ridge` times the layer's mean σ, so that a dead unit stays small. Both are folded into weight and bias in
    closed form; without a bias only a is, with root mean squares in the place of deviations. One pass over at most
    `max_images` examples for each model, and one for the merge, in which every layer gets what the repaired layers
    before it make.

    BatchNorm layers normalise by the batch's own statistics in that pass. Left as they are: the layer that runs last
    and those whose memory is the model's output, layers that share a weight, run several times in a pass, not at all,
    or compute their weight from other tensors. `models`: own first, in one order of units, `mixing`: their
    weights; both come from the merge. Raises MergeError where there is no model, no data, or no models.

    Paper: Jordan et al., "REPAIR", ICLR 2023, arXiv 2211.08403, which inserts such layers behind convolutions and
    resets them; here they are folded, and every model's statistics come from the same examples.
    """
    if model is None or data is None:
        raise MergeError('repair = "variance" runs the models: pass model and data, or choose repair = "none"')
    if not models or mixing is None:
        raise MergeError('repair = "variance" compares the merge with its models, and is a part of merging only')
    layers = _layers(model, weights)
    repaired = batchnorm(weights, model=model, data=data)
    if not layers:
        return repaired
    inputs = _examples(data, max_images)
    device = device_of(model)
    taking = [(each, weight) for each, weight in zip(models, mixing, strict=True) if weight]
    mixing = [weight for _, weight in taking]
    found = [_measured(model, each, layers, inputs, device) for each, _ in taking]
    once = [layer for layer in layers if all(layer in units for units in found)]
    folds: dict[Layer, tuple[Tensor, Tensor]] = {}

    def correct(layer: Layer, output: Tensor) -> Tensor:
        if layer not in once:
            return output
        now = _units(layer, output)
        mean = sum((w * units[layer].mean for w, units in zip(mixing, found, strict=True)), torch.zeros(()))
        goal = sum((w * units[layer].deviation for w, units in zip(mixing, found, strict=True)), torch.zeros(()))
        fold = _fold(now, Units(mean, goal), bound, ridge, shifts=layer.bias is not None)
        folds[layer] = fold
        shape = [1] * output.ndim
        shape[_axis(layer, output)] = -1
        scale, shift = (t.to(output).reshape(shape) for t in fold)
        return output * scale + shift

    with _batch_statistics(model):
        _run(model, repaired.weights, layers, inputs, device, correct)
    folded: dict[str, Tensor] = {}
    for layer, (scale, shift) in folds.items():
        for prefix in layers[layer]:
            folded |= _folded(layer, prefix, scale, shift, repaired.weights)
    if reference is not None:
        before = {name: repaired.weights[name] for name in folded}
        share, _ = reference.without(reference.norms.keys() - folded.keys()).share(before, folded, SIZE)
        folded = between(before, folded, share) if share < 1 else folded
    whole = {**repaired.weights, **folded}
    again = batchnorm(whole, model=model, data=data)
    return Repaired(again.weights, repaired.images + again.images + len(inputs[0]), again.notes)


def _layers(model: nn.Module, weights: Weights) -> dict[Layer, list[str]]:
    """Return the layers with a weight of their own among the weights, and how their tensors' names begin: in more than
    one way where a layer stands under several names."""
    homes = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    found: dict[Layer, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if not isinstance(module, nn.Linear | _ConvNd) or f"{prefix}weight" not in weights:
            continue
        own = dict(module.named_parameters(recurse=False))
        if "weight" in own and all(homes[id(parameter)] == 1 for parameter in own.values()):
            found.setdefault(module, []).append(prefix)
    return found


@contextmanager
def _batch_statistics(model: nn.Module) -> Generator[None]:
    """Context in which BatchNorm layers normalise as in training. Running statistics that a pass changes are copies."""
    norms = [module for module in model.modules() if isinstance(module, Norm)]
    handles = [norm.register_forward_pre_hook(_in_training) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _in_training(norm: nn.Module, _: Any) -> None:
    norm.training = True  # `eval_mode` puts all modules back


def _examples(data: Data, most: int) -> Inputs:
    """Return up to `most` examples as one batch: those of the first batch's shapes."""
    batches: list[Inputs] = []
    for inputs in take(data, most):
        if not batches or [t.shape[1:] for t in inputs] == [t.shape[1:] for t in batches[0]]:
            batches.append(inputs)
    if not batches or not len(batches[0][0]):
        raise MergeError("the data to repair with are empty: pass at least one batch of model inputs")
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def _measured(
    model: nn.Module, weights: Weights, layers: Mapping[Layer, Sequence[str]], inputs: Inputs, device: torch.device
) -> dict[Layer, Units]:
    """Return the units' statistics of the layers that run once, without the one that makes the output."""
    found: dict[Layer, Units] = {}
    calls: Counter[Layer] = Counter()
    made: dict[Layer, Tensor] = {}

    def read(layer: Layer, output: Tensor) -> Tensor:
        calls[layer] += 1
        found[layer] = _units(layer, output)
        made.pop(layer, None)
        made[layer] = output
        return output

    outputs = tree_leaves(_run(model, weights, layers, inputs, device, read))
    memory = {output.untyped_storage().data_ptr() for output in outputs if isinstance(output, Tensor)}
    ends = {layer for layer, output in made.items() if output.untyped_storage().data_ptr() in memory}
    ends |= {*list(made)[-1:]}
    return {layer: units for layer, units in found.items() if calls[layer] == 1 and layer not in ends}


def _run(
    model: nn.Module,
    weights: Weights,
    layers: Mapping[Layer, Sequence[str]],
    inputs: Inputs,
    device: torch.device,
    correct: Correct,
) -> Any:
    with _hooked(model, layers, correct), own_streams(seeded_streams(0, device), device):
        return call_with(model, tensors_for(model, weights, device), on_device(inputs, device))


@contextmanager
def _hooked(model: nn.Module, layers: Mapping[Layer, Sequence[str]], correct: Correct) -> Generator[None]:
    """Context in which the model is in evaluation mode without gradients, and layers give what `correct` makes of
    their outputs. Afterwards the model is as it was."""

    def hook(layer: Any, _: Any, output: Tensor) -> Tensor:
        return correct(layer, output)

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        with eval_mode(model), torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _axis(layer: Layer, output: Tensor) -> int:
    """Return the axis of a layer's output that its units lie along."""
    return output.ndim - 1 if isinstance(layer, nn.Linear) else output.ndim - 1 - len(layer.kernel_size)


def _units(layer: Layer, output: Tensor) -> Units:
    wide = torch.float32 if output.device.type == "mps" else torch.float64
    values = output.detach().to(wide).movedim(_axis(layer, output), 0).flatten(1)
    return Units(values.mean(1).cpu(), values.std(1, correction=0).cpu())


def _fold(now: Units, goal: Units, bound: float, ridge: float, *, shifts: bool) -> tuple[Tensor, Tensor]:
    """Return a and c, (units,) each; without shifts c is 0, and a brings root mean squares together."""
    have, want = now.deviation, goal.deviation
    if not shifts:
        have, want = (torch.hypot(units.mean, units.deviation) for units in (now, goal))
    small = (ridge * want.mean()).clamp_min(torch.finfo(torch.float32).tiny)
    scale = ((want + small) / (have + small)).clamp(1 / bound, bound)
    return scale, goal.mean - scale * now.mean if shifts else torch.zeros_like(scale)


def _folded(layer: Layer, prefix: str, scale: Tensor, shift: Tensor, weights: Weights) -> dict[str, Tensor]:
    """Return a layer's weight and bias with a and c folded in."""
    weight = weights[f"{prefix}weight"]
    wide = weight.double()
    if isinstance(layer, _ConvTransposeNd):  # (in, out / groups, …): the rows of a group make its own outputs
        rows = scale.to(wide).reshape(layer.groups, 1, -1).expand(-1, wide.shape[0] // layer.groups, -1)
        factor = rows.reshape(wide.shape[0], -1)
    else:
        factor = scale.to(wide)
    new = wide * factor.reshape(*factor.shape, *[1] * (wide.ndim - factor.ndim))
    folded = {f"{prefix}weight": new.to(weight)}
    if layer.bias is not None:
        bias = weights[f"{prefix}bias"]
        folded[f"{prefix}bias"] = (bias.double() * scale.to(bias.device) + shift.to(bias.device)).to(bias)
    return folded
