"""Planted permutations: permute a network, align the copy back, and see whether the average is the network again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dimat.merge import align_weights
from dimat.symmetry import derive_symmetry, permute_weights, random_permutations, tree
from dimat.symmetry.stacks import real_names
from dimat.symmetry.verify import randomised
from tests.symmetry.wide.measure import Subject

LARGEST = 30e6
"""Parameters up to which models are aligned."""


FOUND = 1e-4
"""Outputs that differ by no more than this, relative to the largest, are equal as far as float32 can tell."""


BY_WEIGHTS = ("inception_v3", "repvgg_a0", "efficientnet_v2_s")
"""Models that are aligned by weights: with random ones, units of their last layers hardly differ in what they do, and
activations name some of them wrongly (outputs of the average are then 2 to 90 % off)."""


@dataclass(frozen=True)
class Planted:
    """How a model was aligned to a permuted copy of itself.

    `error`: the largest change of a selected output, relative to its largest value, between the network and its average
    with the aligned copy (0: all units found, but for those that are equal). `before`: the same without alignment.
    `exact`: the share of groups whose permutation is the planted one, unit by unit.
    """

    error: float
    before: float
    exact: float
    groups: int


class _Positional(nn.Module):
    """A model that takes those of its named inputs that are tensors by position."""

    def __init__(self, inner: nn.Module, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self.inner = inner
        self.names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
        self.others = {name: value for name, value in inputs.items() if not isinstance(value, Tensor)}

    def forward(self, *inputs: Tensor) -> Any:
        return self.inner(**dict(zip(self.names, inputs)), **self.others)


def recover(subject: Subject, batches: int = 3) -> Planted:
    """Plant a random element of the whole group in a network with random weights, and align it back.

    By activations, and by weights where a group cannot be observed; all by weights where `BY_WEIGHTS` has the model.
    """
    using = "weights" if subject.entry.name in BY_WEIGHTS else "activations"
    model, inputs, spec = subject.model, subject.inputs, subject.spec
    assert spec is not None, subject.row.failure
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if isinstance(inputs, Mapping):
            model, inputs = (
                _Positional(model, inputs).eval(),
                tuple(v for v in inputs.values() if isinstance(v, Tensor)),
            )
            spec = derive_symmetry(model, inputs, subject.entry.outputs)  # observing goes by the trace
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        own = {name: _awake(value) for name, value in randomised(state, generator).items()}
        for tied in spec.tied:
            own.update(dict.fromkeys(tied, own[tied[0]]))
        planted = random_permutations(spec, generator)
        peer = permute_weights(own, spec, planted)
        data = [tuple(_like(tensor, generator) for tensor in inputs) for _ in range(batches)]
        found = align_weights(model, own, peer, spec, data=data, using=using)
        aligned = permute_weights(peer, spec, found)
        reference = _outputs(model, own, inputs, spec.outputs)
        errors = [
            _difference(reference, _outputs(model, _average(own, other), inputs, spec.outputs))
            for other in (aligned, peer)
        ]
    real = real_names(spec)  # of a list of modules no state dict holds the stack
    wrong = {
        group.id
        for group in spec.groups
        for tensor, _ in group.axes
        for name in real.get(tensor, (tensor,))
        if not torch.equal(aligned[name], own[name])
    }
    return Planted(errors[0], errors[1], 1 - len(wrong) / max(len(spec.groups), 1), len(spec.groups))


def _awake(value: Tensor) -> Tensor:
    """Scale up small kernels, without which the signal of a deep network with random weights dies out."""
    if value.ndim < 4 or not value.is_floating_point():
        return value
    return value * max(1.0, value[0].numel() ** -0.5 / max(float(value.std()), 1e-30))


def _like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, generator=generator)
    if tensor.dtype == torch.bool or bool((tensor == tensor.flatten()[0]).all()):
        return tensor
    low, high = int(tensor.min()), int(tensor.max())
    return torch.randint(low, high + 1, tensor.shape, generator=generator)


def _average(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: (v + other[name]) / 2 if v.is_floating_point() else v for name, v in one.items()}


def _outputs(model: nn.Module, weights: Mapping[str, Tensor], inputs: tuple[Any, ...], chosen: Any) -> list[Tensor]:
    model.train().eval()  # what was derived from other weights is forgotten
    leaves = tree.leaves(torch.func.functional_call(model, dict(weights), inputs, tie_weights=False))
    return [leaves[index] for index in chosen]


def _difference(ones: list[Tensor], others: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in zip(ones, others))
