"""Weights read one tensor at a time: from files, permuted, on another device; hashes.

Merging streams over tensor names, so that its peak memory is own model + one tensor per peer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from os import PathLike
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from dimat.merge.stages import Permutations, Weights
from dimat.symmetry import permute_weights
from dimat.symmetry.permute import CheckedPermutations, from_list, permute_listed
from dimat.symmetry.spec import AxisRef, Stack, SymmetrySpec, groups_in
from dimat.symmetry.stacks import read_stack, stacked
from dimat.weights.header import LONGEST_HEADER
from dimat.weights.tensors import Tensors


def open_weights(source: Weights | str | PathLike[str]) -> Weights:
    """Return weights as a mapping from tensor name to tensor; of a safetensors file each access reads one.

    A mapping is returned as it is. Raises DataError, naming the file, where it is missing, truncated or damaged.
    """
    return source if isinstance(source, Mapping) else Tensors(source, longest=LONGEST_HEADER)


class WeightsView(Mapping[str, Tensor]):
    """Tensors by name, each made when it is asked for, and not kept; subclasses say how. `names`: in their order."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names

    def __contains__(self, name: object) -> bool:
        return name in self._names  # without making the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class RenamedWeights(WeightsView):
    """Some tensors of a mapping under other names, each read when it is asked for. `stored`: their names in it."""

    def __init__(self, weights: Weights, stored: Mapping[str, str]) -> None:
        super().__init__(stored)
        self._weights = weights
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[self._stored[name]]


class StackedWeights(WeightsView):
    """Weights beside which the stacks of a spec can be asked for; only real tensors are listed."""

    def __init__(self, weights: Weights, spec: SymmetrySpec) -> None:
        super().__init__(weights)
        self._weights = weights
        self._stacks = {stack.tensor: stack for stack in spec.stacks}

    def __getitem__(self, name: str) -> Tensor:
        stack = self._stacks.get(name)
        return self._weights[name] if stack is None else read_stack(stack, self._weights)


def stacks_of(kind: str, names: Collection[str], spec: SymmetrySpec) -> list[Stack]:
    """Return the spec's stacks as those of statistics of one kind, which parameters' names follow, where any is there.

    In a stack some may be missing, of parameters that were not trained: each goes where its parameter goes.
    """
    stacks = (Stack(kind + s.tensor, tuple(kind + name for name in s.sources)) for s in spec.stacks)
    return [stack for stack in stacks if any(name in names for name in stack.sources)]


def axes_by_name(spec: SymmetrySpec) -> dict[str, list[AxisRef]]:
    """Return the axes that hold units by the names of their tensors, all names of tied ones.

    Those of a stack are named by it; each of its tensors has its own axes too, without the one that numbers them.
    """
    aliases = {name: names for names in spec.tied for name in names}
    found: dict[str, list[AxisRef]] = {}
    for axis in spec.axes:
        for name in aliases.get(axis.tensor, (axis.tensor,)):
            # most are their own: copying each costs seconds where weights are matched, which asks for every step
            found.setdefault(name, []).append(axis if name == axis.tensor else replace(axis, tensor=name))
    for stack in spec.stacks:
        axes = [axis for axis in found.get(stack.tensor, ()) if axis.dim]
        found.update({name: [replace(axis, tensor=name, dim=axis.dim - 1) for axis in axes] for name in stack.sources})
    return found


class PermutedWeights(WeightsView):
    """Weights in another basis: each access permutes one tensor. Stacks of the spec can be asked for too."""

    def __init__(self, weights: Weights, spec: SymmetrySpec, permutations: Permutations) -> None:
        self._listed = stacked(spec)
        self._whole = spec
        self._permutations = permutations
        self._axes = axes_by_name(spec)
        complete = all(name in weights for name in self._listed)
        super().__init__(weights if complete else dict.fromkeys(self._present(weights)))
        self._weights = StackedWeights(weights, spec) if spec.stacks else weights
        self._spec = replace(spec, axes=(), tied=(), stacks=())

    def _present(self, weights: Weights) -> Iterator[str]:
        """Yield the names of tensors that there are: in a stack, those in whose place one comes that there is."""
        for name in dict.fromkeys((*weights, *self._listed)):
            stack = self._listed.get(name)
            if stack is None or from_list(stack, name, self._axes, self._moves)[0] in weights:
                yield name

    @cached_property
    def _moves(self) -> CheckedPermutations:
        return CheckedPermutations.of(self._whole, self._permutations)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._listed:
            return permute_listed(self._weights, name, self._listed[name], self._axes, self._moves)
        axes = tuple(self._axes.get(name, ()))
        groups = set[str]().union(*(groups_in(axis.layout) for axis in axes))
        permutations = {group: p for group, p in self._permutations.items() if group in groups}
        return permute_weights({name: self._weights[name]}, replace(self._spec, axes=axes), permutations)[name]


class WeightsOn(WeightsView):
    """Weights on a device: each access moves one tensor."""

    def __init__(self, weights: Weights, device: torch.device) -> None:
        super().__init__(weights)
        self._weights = weights
        self._device = device

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name].to(self._device)


def content_hash(weights: Weights) -> str:
    """Return a hash of all tensors, by which to tell equal models and to put models in an order of their own."""
    digest = blake3()
    for name in sorted(weights):
        absorb(digest, name, weights[name].detach())
    return digest.hexdigest(length=16)


def absorb(digest: Any, name: str, tensor: Tensor) -> None:
    """Take a tensor's name, shape and values into a hash, whatever its strides and device. Half types count as the
    float32 that they are exactly, so that all agents have one order."""
    values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.resolve_neg()
    dense = values.to("cpu", torch.float32 if values.element_size() < 4 else values.dtype).contiguous()
    digest.update(f"{name}\0{dense.dtype}{[*dense.shape]}\0".encode())
    if dense.numel():
        digest.update(dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data)
