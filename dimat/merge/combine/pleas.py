"""PLeaS: layers fitted, one by one, to what the models do on average."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from dimat.errors import MergeError
from dimat.merge.matching.activation_statistics import PositionSampler
from dimat.merge.models.batches import count, device_of, first_inputs, on_device, take
from dimat.merge.models.functional import aliases, call_with, reading_inputs, tensors_for
from dimat.merge.models.patches import Affine, as_blocks, blocks_of, input_rows, solve_semidefinite
from dimat.merge.registry import combine_registry
from dimat.merge.stages import Data, Inputs, Weights
from dimat.merge.tensors.streaming import combine_tensors, taking_part
from dimat.merge.tensors.task_vectors import mean_of

PIECE = 16
"""Examples per forward pass: the inputs of all layers are held for that long."""


@combine_registry.register("pleas")
def pleas(
    own: Weights,
    peers: Sequence[Weights],
    weights: Sequence[float],
    *,
    model: nn.Module | None = None,
    data: Data | None = None,
    ridge: Annotated[float, Field(ge=0)] = 1e-3,
    max_images: Annotated[int, Field(ge=1)] | None = 1000,
    positions: Annotated[int, Field(ge=1)] | None = 16,
) -> Weights:
    """Return, for each linear layer and convolution, the W and c that minimise ‖W Z̃ + c − Ỹ‖² over `data`:

        Z̃ = Σ_k w_k Z_k,   Ỹ = Σ_k w_k (W_k Z_k + c_k)

    where Z_k (in · kernel, rows) are the layer's inputs in model k: the merged layer does to the models' mean input
    what the models do on average. The models must be in one basis: peers come aligned (preset "pleas" aligns by
    activations). `weights` (own first, sum 1): the w_k. For two models with equal weights this is the paper's
    W = argmin ‖(Z_A + P Z_B) W − (Z'_A + P' Z'_B)‖², all units merged, in closed form.

    Solved for the difference D from the averages W̄, c̄, which leaves R = Σ_k w_k ((W_k − W̄) Z_k + (c_k − c̄)): it is
    0 where models are equal, and inputs that nobody ever sees keep the average. D (S + ridge · diag S) = R Z̃ᵀ with
    S = Z̃ Z̃ᵀ, about the means where the layer has a bias; sums are float64, streamed over batches. Each of a
    convolution's groups is fitted on its own. A layer that runs several times gathers all its inputs, and so does a
    weight that several layers share; one that something else uses too (an embedding, a custom module) is averaged,
    as are all other tensors (norms and their running statistics: see repair = "batchnorm"). Integers are own's.

    `ridge`: relative, for inputs that the data hardly tell apart. `max_images`: look at no more examples (None: all).
    `positions`: rows taken of each example where a layer has more (a convolution's output positions, tokens), drawn
    from a fixed seed; None: all. Memory: all models' weights, and (in · kernel)² numbers a layer.
    Raises MergeError without model and data, and where the inputs of a layer are not finite.

    Paper: Nasery et al., "PLeaS – Merging Models with Permutations and Least Squares", CVPR 2025, arXiv 2407.02447
    (there by gradient descent, and with partial merging of units, which would change the layers' sizes).
    """
    peers, weights = taking_part(peers, weights)
    fitted: dict[str, Tensor] = {}
    if peers:
        if model is None or data is None:
            raise MergeError("combine method 'pleas' needs the model and data to run it on: pass model= and data=")
        parties = [(party, w) for party, w in zip((own, *peers), weights) if w]
        sampler = PositionSampler(positions, torch.Generator().manual_seed(0))
        fitted = _LayerFit(model, own, parties).run(data, max_images, sampler, ridge)

    def merge(name: str, start: Tensor, others: list[Tensor]) -> Tensor:
        total = mean_of([start, *others], weights)
        return total.add_(fitted[name].to(total)) if name in fitted else total

    return combine_tensors(own, peers, merge)


@dataclass
class _LayerSums:
    """Sums over rows, float64: of Z̃ᵀ, R, Z̃ᵀZ̃ and Z̃ᵀR, the latter two by block."""

    count: int
    inputs: Tensor
    rest: Tensor
    squares: Tensor
    products: Tensor

    @staticmethod
    def of(inputs: Tensor, rest: Tensor) -> _LayerSums:
        """inputs: (blocks, rows, in), rest: (blocks, rows, out)."""
        return _LayerSums(inputs.shape[1], inputs.sum(1), rest.sum(1), inputs.mT @ inputs, inputs.mT @ rest)

    def add(self, more: _LayerSums) -> None:
        self.count += more.count
        self.inputs += more.inputs
        self.rest += more.rest
        self.squares += more.squares
        self.products += more.products

    def normal(self, centred: bool) -> tuple[Tensor, Tensor]:
        """Return S and Z̃ᵀR, about the means or not."""
        if not centred:
            return self.squares, self.products
        mean = self.inputs[:, :, None] / self.count
        squares = self.squares - mean * self.inputs[:, None, :]
        return squares, self.products - mean * self.rest[:, None, :]


@dataclass
class _Call:
    """Sums over the models of one run of a layer: Z̃ᵀ and R, by block."""

    inputs: Tensor
    rest: Tensor


class _LayerFit:
    """Gathers the normal equations of a model's layers and solves them."""

    def __init__(self, model: nn.Module, own: Weights, parties: Sequence[tuple[Weights, float]]) -> None:
        self._model = model
        self._parties = parties
        self._layers, self._bias = _layers(model, own)
        mean = {name: _mean(name, own, parties) for name in {*self._layers.values(), *self._bias.values()} - {""}}
        # by model: W_k − W̄ and c_k − c̄
        self._offsets = [{n: party[n].detach().cpu().double() - m for n, m in mean.items()} for party, _ in parties]
        self._moments: dict[tuple[str, str], _LayerSums] = {}
        self._calls: dict[tuple[Affine, int], _Call] = {}

    def run(self, data: Data, max_images: int | None, sampler: PositionSampler, ridge: float) -> dict[str, Tensor]:
        """Return what is to be added to the averages, under all names of the tensors."""
        first_inputs(data)  # says so where there is none
        device = device_of(self._model)
        networks = [tensors_for(self._model, party, device) for party, _ in self._parties]
        for batch in take(data, max_images, PIECE):
            sampler.next_batch()
            for network, offsets, (_, weight) in zip(networks, self._offsets, self._parties):
                self._read(network, offsets, weight, on_device(batch, device), sampler)
            for (layer, _), call in self._calls.items():
                self._take_in(layer, call)
            self._calls.clear()
        deltas = self._solve(ridge)
        return {name: deltas[first] for name, first in aliases(self._model).items() if first in deltas}

    def _read(
        self,
        network: dict[str, Tensor],
        offsets: Mapping[str, Tensor],
        weight: float,
        inputs: Inputs,
        sampler: PositionSampler,
    ) -> None:
        """Run one model and add what its layers take in."""
        runs: dict[Affine, int] = {}
        examples = count(inputs)

        def reader(layer: Affine) -> Callable[[Tensor], None]:
            def read(x: Tensor) -> None:
                blocks = blocks_of(layer)
                rows = input_rows(layer, x, lambda numbers: sampler(numbers, examples))
                rows = rows.cpu().double() if rows.device.type == "mps" else rows.double()
                rest = rows @ as_blocks(offsets[self._layers[layer]].to(rows.device), blocks).mT
                if self._bias[layer]:
                    rest += offsets[self._bias[layer]].to(rows.device).view(blocks, 1, -1)
                key = (layer, runs.get(layer, 0))
                runs[layer] = key[1] + 1
                call = self._calls.setdefault(key, _Call(torch.zeros_like(rows), torch.zeros_like(rest)))
                if call.inputs.shape != rows.shape:
                    name = self._layers[layer]
                    raise MergeError(f"pleas: the layer of {name!r} takes in differently many rows in different models")
                call.inputs.add_(rows, alpha=weight)
                call.rest.add_(rest, alpha=weight)

            return read

        with reading_inputs(self._model, {layer: reader(layer) for layer in self._layers}):
            call_with(self._model, network, inputs)

    def _take_in(self, layer: Affine, call: _Call) -> None:
        key = (self._layers[layer], self._bias[layer])
        found = _LayerSums.of(call.inputs, call.rest)
        if key in self._moments:
            self._moments[key].add(found)
        else:
            self._moments[key] = found

    def _solve(self, ridge: float) -> dict[str, Tensor]:
        """Return D and the change of each bias, under first names and in the shape of the tensors."""
        deltas: dict[str, Tensor] = {}
        for name in dict.fromkeys(weight for weight, _ in self._moments):
            parts = {bias: moments for (weight, bias), moments in self._moments.items() if weight == name}
            normal = [moments.normal(bool(bias)) for bias, moments in parts.items()]
            squares = torch.stack([squares for squares, _ in normal]).sum(0)
            products = torch.stack([products for _, products in normal]).sum(0)
            if not (squares.isfinite().all() and products.isfinite().all()):
                raise MergeError(f"pleas: the inputs of {name!r} are not finite: are the weights and data?")
            change = torch.stack([solve_semidefinite(s, p, ridge) for s, p in zip(squares, products)])
            deltas[name] = change.mT.reshape(self._offsets[0][name].shape)
            for bias, moments in parts.items():
                if bias:
                    explained = (moments.inputs[:, None, :] @ change)[:, 0]
                    deltas[bias] = ((moments.rest - explained) / moments.count).flatten()
        return deltas


def _layers(model: nn.Module, own: Weights) -> tuple[dict[Affine, str], dict[Affine, str]]:
    """Return the layers that are fitted with the first name of their weight, and of their bias ("" where they have none
    of their own). Left out are layers whose weight something else uses too."""
    names = aliases(model)
    users: dict[str, list[nn.Module]] = {}
    weight: dict[nn.Module, str] = {}
    bias: dict[nn.Module, str] = {}
    for prefix, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
            first = names[f"{prefix}.{name}" if prefix else name]
            users.setdefault(first, []).append(module)
            if isinstance(module, Affine) and tensor.is_floating_point() and first in own:
                if name == "weight":
                    weight[module] = first
                elif name == "bias":
                    bias[module] = first
    kept = {
        layer: first
        for layer, first in weight.items()
        if isinstance(layer, Affine) and all(_alike(layer, user) for user in users[first])
    }
    # a bias that goes with two weights, or is in other use, is averaged, and the weights are fitted around it
    own_bias = {first for first, modules in users.items() if len({weight.get(module) for module in modules}) == 1}
    return kept, {layer: first if (first := bias.get(layer, "")) in own_bias else "" for layer in kept}


def _alike(layer: Affine, user: nn.Module) -> bool:
    """Tell whether two modules apply a weight as matrices of one shape."""
    return isinstance(user, Affine) and blocks_of(user) == blocks_of(layer)


def _mean(name: str, own: Weights, parties: Sequence[tuple[Weights, float]]) -> Tensor:
    """Return the weighted average of a tensor as `merge` makes it: θ_own + Σ_k w_k (θ_k − θ_own), float64."""
    peers = [(party, weight) for party, weight in parties if party is not own]
    tensors = [party[name].detach().cpu().double() for party in (own, *(party for party, _ in peers))]
    return mean_of(tensors, [0.0, *(weight for _, weight in peers)])
