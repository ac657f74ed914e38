"""A model's classifier: finds its layer, and takes statistics of its inputs by class."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from blake3 import blake3
from pydantic import Field
from torch import Tensor, nn

from dimat.errors import ConfigError, MergeError
from dimat.merge.class_statistics import COUNT, FACTOR, MEAN, VARIANCE
from dimat.merge.models.batches import device_of, on_device
from dimat.merge.shared_statistics import Examples
from dimat.symmetry.trace import eval_mode

NEEDED = "statistics by class need a classifier whose last layer is one nn.Linear"

RANK = 4
"""Leading directions of a class's covariance that are sent by default, if any are."""


class Read(NamedTuple):
    """A pass over examples. `weight`: name of the head's weight, (classes, d); `features`: (N, d) float32, its
    inputs; `labels`: (N,) int64; both on the CPU."""

    weight: str
    classes: int
    features: Tensor
    labels: Tensor


def read_features(model: nn.Module, examples: Examples) -> Read:
    """Run a model on examples, in evaluation mode, and return the inputs of its head with their labels.

    The head is the nn.Linear whose output is the model's own (or the `logits` of it). The model is left as it was. All
    features are held at once. Raises ConfigError if there is no such layer, or targets are not class labels; MergeError
    if there are no examples, or a feature is not finite.
    """
    device = device_of(model)
    found: tuple[str, nn.Linear] | None = None
    features: list[Tensor] = []
    labels: list[Tensor] = []
    with _watching(model) as calls, eval_mode(model), torch.no_grad():
        for inputs, targets in examples:
            calls.clear()
            output: Any = model(*on_device(inputs, device))
            logits = getattr(output, "logits", output)
            layer, given = next(((m, x) for m, x, y in calls if y is logits), (None, None))
            if layer is None or given is None or (found is not None and found[1] is not layer):
                raise ConfigError(f"{NEEDED}: no such layer's output is the model's; leave that setting out")
            if found is None:
                found = (_name_of(model, layer), layer)
            _check_labels(targets, given, layer)
            features.append(given.detach().float().cpu())
            labels.append(targets.detach().cpu().long())
    if found is None:
        raise MergeError("there are no examples for statistics by class: pass at least one batch")
    joined = torch.cat(features)
    if not bool(joined.isfinite().all()):
        raise MergeError(f"the inputs of {found[0]!r} are not finite: are the weights and data?")
    return Read(found[0], found[1].out_features, joined, torch.cat(labels))


def class_counts_of(
    model: nn.Module, examples: Examples, *, loss: Callable[[Any, Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the number of examples of each class: {"class_count.<head's weight>": (classes,)}.

    The loss is not used. Raises the errors of `read_features`.
    """
    read = read_features(model, examples)
    return {COUNT + read.weight: torch.bincount(read.labels, minlength=read.classes)}


def class_statistics(
    model: nn.Module,
    examples: Examples,
    *,
    loss: Callable[[Any, Tensor], Tensor] | None = None,
    covariance: Literal["diagonal", "low-rank"] = "diagonal",
    rank: Annotated[int, Field(ge=1)] = RANK,
    clip: Annotated[float, Field(gt=0)] | None = None,
    noise: Annotated[float, Field(ge=0)] = 0.0,
) -> dict[str, Tensor]:
    """Return count, mean and variance by class of the inputs of a model's head, as named in `class_statistics`.

    With "low-rank" also the `rank` leading directions of each class's covariance, times their standard deviations. Sums
    are in float64, results float32. `clip`: features are scaled down to this 2-norm. `noise` σ: Gaussian noise of
    standard deviation σ · clip / n is added to each entry of the mean of a class of n examples, and of σ · clip² / n to
    its second moments; directions are then not sent. The noise is seeded by the statistics themselves, so that equal
    ones give equal bits and nobody can subtract it without knowing them; counts are exact, and rounds add up: no
    privacy budget is kept. The loss is not used. Raises the errors of `read_features`, and ConfigError for noise
    without clip or with directions.

    Paper: Luo et al., "No Fear of Heterogeneity: Classifier Calibration for Federated Learning with Non-IID Data",
    NeurIPS 2021, arXiv 2106.05001.
    """
    if noise and (clip is None or covariance != "diagonal"):
        raise ConfigError('noise needs clip, the largest norm of features, and covariance = "diagonal"')
    read = read_features(model, examples)
    features = read.features.double()
    if clip is not None:
        features = features * (clip / features.norm(dim=1, keepdim=True).clamp_min(clip))
    count = torch.bincount(read.labels, minlength=read.classes)
    size = count.clamp_min(1).double()[:, None]
    zeros = features.new_zeros(read.classes, features.shape[1])
    mean = zeros.index_add(0, read.labels, features) / size
    centred = features - mean[read.labels]
    variance = zeros.index_add(0, read.labels, centred.square()) / size
    found = {COUNT: count}
    if noise and clip is not None:
        mean, variance = _noisy(mean, variance, count, noise, clip)
    if covariance == "low-rank":
        factor = features.new_zeros(read.classes, min(rank, features.shape[1]), features.shape[1])
        for c in count.nonzero().flatten().tolist():
            _, scale, rows = torch.linalg.svd(centred[read.labels == c] / size[c].sqrt(), full_matrices=False)
            kept = min(factor.shape[1], len(scale))
            signs = torch.where(rows[:kept].sum(1) < 0, -1.0, 1.0)  # a row has no sign: so draws are equal in any basis
            factor[c, :kept] = (signs * scale[:kept])[:, None] * rows[:kept]
        found[FACTOR] = factor.float()
    found |= {MEAN: mean.float(), VARIANCE: variance.float()}
    return {kind + read.weight: tensor for kind, tensor in found.items()}


def _noisy(mean: Tensor, variance: Tensor, count: Tensor, noise: float, clip: float) -> tuple[Tensor, Tensor]:
    """Return means and variances with noise, then limited to values that clipped features can have."""
    present = (count > 0)[:, None]
    size = count.clamp_min(1).double()[:, None]
    clean = b"".join(tensor.contiguous().numpy().tobytes() for tensor in (mean, variance, count))
    key = int.from_bytes(blake3(clean).digest(length=16), "little")
    normal = np.random.Generator(np.random.Philox(key=key)).standard_normal((2, *mean.shape))  # 128 bits of key
    first, second = torch.from_numpy(normal)
    moment = (variance + mean.square() + second * (noise * clip**2 / size)).clamp_min(0)
    moment = moment * (clip**2 / moment.sum(1, keepdim=True).clamp_min(clip**2))
    mean = mean + first * (noise * clip / size)
    mean = mean * (clip / mean.norm(dim=1, keepdim=True).clamp_min(clip))
    return mean * present, (moment - mean.square()).clamp_min(0) * present


def _name_of(model: nn.Module, layer: nn.Linear) -> str:
    """Return the name of a layer's weight; ConfigError if it has none of its own."""
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is layer]
    weight = f"{names[0]}.weight" if names[0] else "weight"
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if weight not in parameters:
        raise ConfigError(f"{NEEDED}, and the weight of {names[0]!r} is computed from others; leave that setting out")
    if weight not in model.state_dict():  # of a model that is trained in part, that is the part
        raise ConfigError(
            f"{NEEDED}, and {weight!r} is not among the weights that are exchanged; leave that setting out"
        )
    if sum(parameter is parameters[weight] for parameter in parameters.values()) > 1:
        raise ConfigError(f"{NEEDED} of its own, and {weight!r} is another layer's too; leave that setting out")
    return weight


def _check_labels(targets: Tensor, features: Tensor, layer: nn.Linear) -> None:
    whole = not targets.is_floating_point() and not targets.is_complex() and targets.dtype != torch.bool
    if not whole or targets.ndim != 1 or features.shape != (len(targets), layer.in_features):
        raise ConfigError(
            f"statistics by class need one class label for each example: targets are {[*targets.shape]} of "
            f"{str(targets.dtype).removeprefix('torch.')}, the head's inputs {[*features.shape]}; choose another "
            "merge.repair"
        )
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < layer.out_features:
        raise ConfigError(
            f"statistics by class need labels from 0 to {layer.out_features - 1}, the outputs of the head; targets go "
            f"from {int(targets.min())} to {int(targets.max())}"
        )


@contextmanager
def _watching(model: nn.Module) -> Generator[list[tuple[nn.Linear, Tensor, Any]]]:
    """Context that lists the calls of linear layers: the layer, its input, its output."""
    calls: list[tuple[nn.Linear, Tensor, Any]] = []

    def hook(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if isinstance(layer, nn.Linear):
            calls.append((layer, inputs[0] if inputs else named["input"], output))

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
