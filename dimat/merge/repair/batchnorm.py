"""BatchNorm re-estimation: running statistics of the merged model, from one pass over data.

Averaged weights make activations that neither model's running statistics describe (variance collapse), so
they are measured anew. Every forward pass normalises by the batch's own statistics, which BatchNorm layers
compute in training mode anyway: they are read off after each call, so the pass costs no more than a forward.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dimat.device import own_streams, seeded_streams
from dimat.errors import MergeError
from dimat.merge.models.batches import GeometricChecks, count, device_of, join_single, on_device, take
from dimat.merge.models.functional import call_with
from dimat.merge.registry import repair_registry
from dimat.merge.stages import Data, Inputs, Repaired, Weights
from dimat.symmetry.trace import eval_mode

FIRST_CHECK = 128
"""Images after which the statistics are first looked at for stability."""

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def running_statistics(model: nn.Module) -> frozenset[str]:
    """Return the names of the model's running means and variances, under all names of their modules."""
    prefixes = [prefix for layer in _layers(model).values() for prefix in layer.names]
    return frozenset(prefix + kind for prefix in prefixes for kind in ("running_mean", "running_var"))


@repair_registry.register("batchnorm", renews=running_statistics)
def batchnorm(
    weights: Weights,
    *,
    model: nn.Module | None,
    data: Data | None,
    estimator: Literal["pooled", "batch-mean"] = "pooled",
    max_images: Annotated[int, Field(ge=2)] | None = None,
    stable_within: Annotated[float, Field(ge=0)] | None = 0.03,
) -> Repaired:
    """Return the weights with BatchNorm running statistics re-estimated from `data`.

    With batches b of n_b values per channel (mean m_b, population variance v_b) and N = Σ n_b:
    "pooled": mean = Σ n_b m_b / N, var = Σ n_b (v_b + (m_b − mean)²) / (N − 1), the exact moments of all values,
    in float64. "batch-mean": plain means over batches of m_b and n_b/(n_b − 1) v_b, which is what torch computes
    with `momentum=None` and what DIMAT's authors use.

    `max_images`: take no more examples than this. `stable_within`: stop once the statistics change by less than
    this between two looks, each at twice the images of the one before (root mean square over channels, in units
    of the channel's standard deviation; worst layer), which is about the standard error that is left; batches
    must then come in random order. None: take them all.
    `model` gives the architecture: its weights, buffers, mode and momentum are as before, and so is the random
    state. All other layers run in evaluation mode. Models without running statistics cost nothing.
    Raises MergeError where there is no model or no data, or only one value per channel.

    Paper: Jordan et al., "REPAIR", ICLR 2023, arXiv 2211.08403 (re-estimation as in their section on BatchNorm).
    """
    if model is None:
        raise MergeError('re-estimating BatchNorm needs the model: pass it, or choose repair = "none"')
    layers = _layers(model)
    if not layers:
        return Repaired(dict(weights))
    if data is None:
        raise MergeError('re-estimating BatchNorm needs data: pass some, or choose repair = "none"')
    images = 0
    checks = GeometricChecks(FIRST_CHECK)
    with _reading_statistics(model, layers):
        device = device_of(model)
        tensors = _with_fresh_buffers(weights, model, device)
        for inputs in join_single(take(data, max_images)):
            _forward(model, tensors, on_device(inputs, device))
            images += count(inputs)
            if stable_within is not None and checks.due(images):
                if max(layer.change() for layer in layers.values()) <= stable_within:
                    break
    if not images:
        raise MergeError("the data to re-estimate BatchNorm on are empty: pass at least one batch")
    repaired = dict(weights)
    for layer in layers.values():
        if layer.calls:  # a layer that the forward pass never reached keeps what it has
            mean, variance = layer.pooled() if estimator == "pooled" else layer.batch_mean()
            for name in layer.names:
                repaired[f"{name}running_mean"] = mean.to(weights[f"{name}running_mean"])
                repaired[f"{name}running_var"] = variance.to(weights[f"{name}running_var"])
    return Repaired(repaired, images)


class _Layer:
    """Statistics of the inputs of one BatchNorm layer. `names`: its prefixes in the state dict (more if shared)."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.calls = 0
        self._values = 0  # per channel
        self._mean = self._squares = torch.zeros(())  # exact running moments: mean, Σ (x − mean)²
        self._batch_means = self._batch_variances = torch.zeros(())  # sums over batches
        self._before: tuple[Tensor, Tensor] | None = None

    def add(self, values: int, mean: Tensor, variance: Tensor) -> None:
        """Add a batch of `values` values per channel with this mean and unbiased variance; (channels,) float64."""
        self.calls += 1
        self._batch_means = self._batch_means + mean
        self._batch_variances = self._batch_variances + variance
        total = self._values + values
        step = mean - self._mean  # Chan et al.: moments of a union from the moments of its parts
        self._squares = self._squares + variance * (values - 1) + step.square() * (self._values * values / total)
        self._mean = self._mean + step * (values / total)
        self._values = total

    def pooled(self) -> tuple[Tensor, Tensor]:
        return self._mean, self._squares / (self._values - 1)

    def batch_mean(self) -> tuple[Tensor, Tensor]:
        return self._batch_means / self.calls, self._batch_variances / self.calls

    def change(self) -> float:
        """Return how far mean and deviation moved since the last call, in units of the deviation; inf at first."""
        if not self.calls:
            return 0.0
        mean, deviation = self._mean, self.pooled()[1].sqrt()
        before, self._before = self._before, (mean, deviation)
        if before is None:
            return float("inf")
        unit = deviation.clamp_min(torch.finfo(torch.float32).tiny)
        moved = torch.stack([(mean - before[0]) / unit, (deviation - before[1]) / unit])
        return float(moved.square().mean(1).sqrt().amax())


def _layers(model: nn.Module) -> dict[Norm, _Layer]:
    """Return the BatchNorm layers that keep running statistics."""
    layers: dict[Norm, _Layer] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Norm) and module.running_mean is not None:
            layers.setdefault(module, _Layer()).names.append(f"{name}." if name else "")
    return layers


@contextmanager
def _reading_statistics(model: nn.Module, layers: Mapping[Norm, _Layer]) -> Generator[None]:
    """Put BatchNorm layers in training mode with momentum 1, all else in evaluation mode, and read their
    statistics after every call; on leaving, everything is as before."""
    momenta = [(norm, norm.momentum) for norm in layers]
    handles = [norm.register_forward_hook(_reader(layer)) for norm, layer in layers.items()]
    try:
        device = device_of(model)
        with eval_mode(model), torch.no_grad(), own_streams(seeded_streams(0, device), device):
            for norm in layers:
                norm.training = True
                norm.momentum = 1.0  # running statistics are those of the last batch
            yield
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum in momenta:
            norm.momentum = momentum


def _reader(layer: _Layer) -> Any:
    def read(norm: Norm, inputs: tuple[Tensor, ...], _: Any) -> None:
        mean, variance = norm.running_mean, norm.running_var
        if mean is not None and variance is not None:
            layer.add(inputs[0].numel() // mean.numel(), mean.cpu().double(), variance.cpu().double())

    return read


def _with_fresh_buffers(weights: Weights, model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Return the weights on the model's device, tied ones under one name; running statistics and other buffers
    are copies, so that a forward pass cannot write into them, and finite, since 0 · NaN would survive momentum 1."""
    tensors = {name: weights[name].to(device) for name, _ in model.named_parameters()}
    for name, _ in model.named_buffers():
        if name in weights:  # not those that are never saved
            tensors[name] = weights[name].to(device, copy=True).nan_to_num_()
    return tensors


def _forward(model: nn.Module, tensors: dict[str, Tensor], inputs: Inputs) -> None:
    try:
        call_with(model, tensors, inputs)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise MergeError(f"re-estimating BatchNorm needs more data: {error}") from error
