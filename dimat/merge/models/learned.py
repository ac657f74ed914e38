"""Coefficients learned on data: a model θ_base + Σ_k λ_k τ_k as a function of λ.

With g the gradient of a loss with respect to a layer's tensor θ^l, ∂L/∂λ_k^l = ⟨g, τ_k^l⟩, so one backward pass through
the model gives the gradient with respect to all coefficients; the graph does not grow with the number of models. The
deltas are kept in memory, in float32 (float64 if this agent's tensor is). A layer is one parameter tensor; tied names
are one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from math import isfinite
from typing import Any, cast

import torch
from torch import Tensor, nn

from dimat.errors import MergeError
from dimat.merge.models.batches import count, device_of, on_device, take
from dimat.merge.models.functional import aliases, call_with
from dimat.merge.stages import Data, Inputs, Weights
from dimat.merge.tensors.pieces import accumulator, real
from dimat.merge.tensors.streaming import MergedWeights, base_tensor
from dimat.merge.tensors.task_vectors import Participants, weighted_sum
from dimat.symmetry.trace import eval_mode

BETAS = (0.9, 0.999)
EPSILON = 1e-8
"""Adam's constants."""

Directions = Callable[[list[Tensor]], list[Tensor]]
"""Deltas of one tensor → the directions that the coefficients scale, e.g. trimmed deltas."""

Loss = Callable[[Tensor], Tensor]
"""Logits → a scalar."""


class Span:
    """The models θ_base + Σ_k λ_k τ_k, with one coefficient per participating model and layer.

    Floating-point buffers (running statistics) and tensors without a parameter in the model are not layers: they are
    averaged by the mixing weights, as a loss says nothing about them. `classes`: the axis of the model's output along
    which the classes lie. Raises MergeError if the weights are not the model's, or base tensors do not fit.
    """

    def __init__(
        self, cast: Participants, base: Weights, model: nn.Module, classes: int, directions: Directions | None = None
    ) -> None:
        self.cast = cast
        self._source = base
        self._model = model
        self._classes = classes
        self._directions = directions or _as_they_are
        self._names = aliases(model)
        device = device_of(model)
        self._start: dict[str, Tensor] = {}
        self._along: dict[str, list[Tensor]] = {}
        self.shares = [c / sum(cast.coefficients) for c in cast.coefficients]
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name not in cast.own:
                    raise MergeError(f"tensor {name!r} of the model is missing from own weights: is it their model?")
                if cast.own[name].shape != parameter.shape:
                    found = [*cast.own[name].shape]
                    raise MergeError(f"tensor {name!r} is {found}, in the model {[*parameter.shape]}")
                start, deltas = self._read(name)
                kind = torch.promote_types(cast.own[name].dtype, torch.float32)
                self._start[name] = start.to(device, kind)
                self._along[name] = [d.to(device, kind) for d in self._directions(deltas)]
            for name, buffer in buffers.items():
                if name in cast.own:
                    ours = cast.own[name]
                    if ours.is_floating_point():
                        start, deltas = self._read(name)
                        average = start + weighted_sum(deltas, self.shares)
                        buffers[name] = average.to(device, torch.promote_types(ours.dtype, torch.float32))
                    else:
                        buffers[name] = ours.to(buffer.device, copy=True)
        self._buffers = buffers
        self.layers = [*self._start]
        kinds = [tensor.dtype for tensor in self._start.values() if tensor.is_floating_point()]
        if not kinds:
            raise MergeError("the model has no parameter to learn coefficients of")
        self._input_kind = kinds[0]

    def _read(self, name: str) -> tuple[Tensor, list[Tensor]]:
        """Return a tensor of the base and the deltas of the participating models, in the type in which they are
        summed."""
        own = self.cast.own[name].detach()
        dtype = accumulator(own)
        start = base_tensor(name, own, self._source).to(dtype)
        taking = [*([own] if self.cast.with_own else []), *(peer[name].detach() for peer in self.cast.peers)]
        return start, [tensor.to(own.device, dtype) - start for tensor in taking]

    def at(self, coefficients: Tensor) -> dict[str, Tensor]:
        """Return the parameters at coefficients of shape (models, layers), on the model's device."""
        point: dict[str, Tensor] = {}
        for name, column in zip(self.layers, coefficients.detach().T.tolist()):
            tensor = self._start[name].clone()
            for direction, c in zip(self._along[name], column):
                tensor.add_(direction, alpha=c)
            point[name] = tensor
        return point

    def gradient(self, coefficients: Tensor, inputs: Inputs, loss: Loss) -> tuple[float, Tensor]:
        """Return the loss of a batch, and its gradient (models, layers) over the coefficients: float64, on the CPU.

        Raises MergeError if the loss is not finite.
        """
        point = self.at(coefficients)
        with torch.enable_grad():
            for tensor in point.values():
                tensor.requires_grad_()
            value = loss(self._run({**self._buffers, **point}, inputs))
            found: Any = torch.autograd.grad(value, [*point.values()], allow_unused=True)
        value = float(value.detach())
        if not isfinite(value):
            raise MergeError(f"the loss on the data to merge with is {value}: are the data finite?")
        result = torch.zeros(coefficients.shape, dtype=torch.float64)
        for layer, (name, g) in enumerate(zip(self.layers, found)):
            if g is not None:  # the model may not use a parameter
                flat = real(g).flatten()
                for k, direction in enumerate(self._along[name]):
                    result[k, layer] = _dot(flat, real(direction).flatten())
        return value, result

    def logits(self, coefficients: Tensor, inputs: Inputs) -> Tensor:
        """Return the model's outputs at coefficients, classes last."""
        with torch.no_grad():
            return self._run({**self._buffers, **self.at(coefficients)}, inputs)

    def member(self, k: int, inputs: Inputs) -> Tensor:
        """Return the outputs of a participating model, with its own buffers, classes last."""
        weights = [*([self.cast.own] if self.cast.with_own else []), *self.cast.peers][k]
        tensors = {name: weights[name].detach().to(t.device, t.dtype) for name, t in self._start.items()}
        for name, buffer in self._buffers.items():
            tensors[name] = weights[name].detach().to(buffer, copy=True) if name in weights else buffer.clone()
        with torch.no_grad():
            return self._run(tensors, inputs)

    def gram(self) -> Tensor:
        """Return the inner products of the models' directions over all layers: (models, models) float64."""
        count = len(self.cast.coefficients)
        gram = torch.zeros(count, count, dtype=torch.float64)
        for along in self._along.values():
            flat = [real(d).flatten() for d in along]
            for i in range(count):
                for j in range(i + 1):
                    gram[i, j] += _dot(flat[i], flat[j])
        return gram + gram.tril(-1).T

    def merged(self, coefficients: Tensor) -> Weights:
        """Return the weights at coefficients of shape (models, layers) or (models, 1), in the types of this agent's
        weights."""
        columns = dict(zip(self.layers, coefficients.detach().expand(-1, len(self.layers)).T.tolist()))

        def merge(name: str, own: Tensor, _: list[Tensor]) -> Tensor:
            start, deltas = self._read(name)
            column = columns.get(self._names.get(name, name))
            if column is None:
                return (start + weighted_sum(deltas, self.shares)).to(own.dtype)
            return (start + weighted_sum(self._directions(deltas), column)).to(own.dtype)

        return MergedWeights(self.cast.own, [], merge)

    def _run(self, tensors: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        arguments = [x.to(self._input_kind) if x.is_floating_point() else x for x in inputs]
        with eval_mode(self._model), torch.random.fork_rng(devices=[]):
            output = call_with(self._model, tensors, on_device(tuple(arguments), device_of(self._model)))
        logits = _logits_of(output)
        if not -logits.ndim <= self._classes < logits.ndim:
            raise MergeError(f"the model's output is {[*logits.shape]}, which has no axis {self._classes} for classes")
        return logits.movedim(self._classes, -1)


def needs_model(model: nn.Module | None, data: Data | None, method: str) -> tuple[nn.Module, Data]:
    """Return model and data; MergeError, saying what to do, where one is missing."""
    if model is None or data is None:
        lacking = "the model" if model is None else "data, batches of its inputs"
        raise MergeError(f"combine method {method!r} learns its coefficients: pass {lacking}")
    return model, data


def batches_of(data: Data, steps: int, batch_size: int | None) -> list[Inputs]:
    """Return as many batches as `steps` take, or all if there are fewer; MergeError if there are none."""
    batches = [*islice((inputs for inputs in take(data, None, batch_size) if count(inputs)), steps)]
    if not batches:
        raise MergeError("the data to merge with are empty: pass at least one batch of model inputs")
    return batches


def descend(
    start: Tensor,
    gradient: Callable[[Tensor, int], Tensor],
    *,
    steps: int,
    lr: float,
    bounds: tuple[float, float] | None = None,
) -> Tensor:
    """Return `start` after `steps` steps of Adam (Kingma, Ba, arXiv 1412.6980), clamped to `bounds` after each.

    `gradient` takes the point and the step's number.
    """
    point, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(steps):  # by hand: torch.optim takes seconds to be imported, and these are a few numbers
        found = gradient(point, step)
        mean = BETAS[0] * mean + (1 - BETAS[0]) * found
        square = BETAS[1] * square + (1 - BETAS[1]) * found.square()
        deviation = (square / (1 - BETAS[1] ** (step + 1))).sqrt()
        point = point - lr / (1 - BETAS[0] ** (step + 1)) * mean / (deviation + EPSILON)
        if bounds is not None:
            point = point.clamp(*bounds)
    return point


def cross_entropy(logits: Tensor, target: Tensor | None = None) -> Tensor:
    """Return the mean of −Σ_c p_c log q_c, q being the softmax of the logits, classes last; p is `target`, or q itself:
    the entropy."""
    log = logits.log_softmax(-1)
    return -((log.exp() if target is None else target) * log).sum(-1).mean()


def _as_they_are(deltas: list[Tensor]) -> list[Tensor]:
    return deltas


def _dot(one: Tensor, other: Tensor) -> float:
    """Return an inner product, summed in float64 on devices that have it."""
    wide = torch.float32 if one.device.type == "mps" else torch.float64
    return float((one * other).sum(dtype=wide))


def _logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output: the tensor itself, `.logits`, ["logits"], or the first of a tuple."""
    if isinstance(output, Mapping):
        output = cast("Mapping[str, Any]", output).get("logits")
    elif isinstance(output, tuple | list) and output:
        output = cast("Sequence[Any]", output)[0]
    else:
        output = getattr(output, "logits", output)
    if not isinstance(output, Tensor) or not output.is_floating_point() or not output.ndim:
        raise MergeError(f"the model's output has no logits to learn from, it is {type(output).__name__}")
    return output
