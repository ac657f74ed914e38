"""Merging units many to one: how a tensor's axes follow when several units become one.

A permutation moves all axes of a group alike. A merge of units does not: in the layer that computes them, rows are
averaged; in a layer that reads them, columns are summed, for there the merged unit stands for each member.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from dimat.merge.models.functional import aliases
from dimat.symmetry.spec import AxisRef, SymmetrySpec

Taken = Mapping[str, Mapping[int, int]]
"""Tensor → the axes over which its layer sums, each with the number of blocks (a convolution's groups) in it."""

Labels = Mapping[str, Tensor]
"""Group id → the merged unit that each of a model's units becomes, (units,) int64. Groups left out: each its own."""

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def taken_axes(model: nn.Module, spec: SymmetrySpec) -> Taken:
    """Return which axes of which tensors run over a layer's inputs, by all names of the tensors.

    Known by the kind of module that holds the tensor: linear and bilinear layers, convolutions (transposed ones too),
    recurrent layers, attention, GPT-2's kind of linear layer. For other modules it is dim 1 of a matrix both of
    whose axes hold units. A tensor with which one module reads units and another computes them (an output layer tied
    to an embedding) counts as computing them: it is averaged. For units merged one to one both give the same result.
    """
    both = {
        axis.tensor
        for axis in spec.axes
        if axis.dim == 1 and any(other.tensor == axis.tensor and other.dim == 0 for other in spec.axes)
    }
    names = aliases(model)
    found: dict[str, dict[int, int]] = {}
    for prefix, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
            whole = f"{prefix}.{name}" if prefix else name
            axes = _taken(module, name, tensor)
            if axes is None:
                axes = {1: 1} if tensor.ndim == 2 and whole in both else {}
            first = names[whole]
            found[first] = {d: g for d, g in axes.items() if d in found[first]} if first in found else axes
    return {name: found[first] for name, first in names.items() if first in found}


def merge_units(
    tensors: Sequence[Tensor], weights: Sequence[float], axes: Sequence[AxisRef], labels: Sequence[Labels], taken: Taken
) -> Tensor:
    """Return one merged tensor of the models, in which each unit has become the merged unit of its label.

    Entry c (an index of merged units along every axis) is Σ_k w_k Σ_{i of model k in c} T_k[i] / Σ_k w_k n_k(c): a
    sum over all members i, divided by their weight, where n_k counts members along axes that are not `taken`. For
    one such axis that is M_out,k T_k U_in,k of the paper, summed over models, with M's rows scaled to sum 1. Entries
    that no model has (two axes of units that never met in one) are 0. `axes`: the tensor's; all in one type.
    """
    total = torch.zeros_like(tensors[0])
    mass = torch.zeros_like(tensors[0], dtype=tensors[0].dtype.to_real())
    for tensor, weight, becomes in zip(tensors, weights, labels):
        count = torch.ones([1] * tensor.ndim, dtype=mass.dtype, device=tensor.device)
        for axis in axes:
            blocks = taken.get(axis.tensor, {}).get(axis.dim)
            index, members = (t.to(tensor.device) for t in _axis(axis, becomes, blocks))
            tensor = torch.zeros_like(tensor).index_add_(axis.dim, index, tensor)
            shape = [-1 if dim == axis.dim else 1 for dim in range(tensor.ndim)]
            count = count * members.to(count.dtype).view(shape)
        total.add_(tensor, alpha=weight)
        mass += count * weight
    return total / mass.where(mass > 0, torch.ones_like(mass))


def _axis(axis: AxisRef, labels: Labels, blocks: int | None) -> tuple[Tensor, Tensor]:
    """Return the entry that each entry of an axis becomes, and how many members each entry has to be averaged over.
    `blocks`: into how many the axis falls where it is summed over; None where it is not."""
    index: list[Tensor] = []
    members: list[Tensor] = []
    start = 0
    for segment in axis.layout:
        sizes = [factor.size for factor in segment]
        place = torch.arange(prod(sizes)).view(sizes)
        count = torch.ones(sizes)
        for position, factor in enumerate(segment):
            becomes = labels.get(factor.group) if factor.group is not None else None
            if becomes is None:
                continue
            place = place.index_select(position, becomes)
            # a convolution's groups are no inputs: what is of one stays in it
            grouped = blocks is not None and blocks > 1 and position == 0 and factor.size == blocks
            if blocks is None or grouped:
                shape = [-1 if p == position else 1 for p in range(len(sizes))]
                count = count * torch.bincount(becomes, minlength=factor.size).view(shape)
        index.append(place.flatten() + start)
        members.append(count.flatten())
        start += prod(sizes)
    return torch.cat(index), torch.cat(members)


def _taken(module: nn.Module, name: str, tensor: Tensor) -> dict[int, int] | None:
    """Return the taken axes of a module's own tensor; None for a module of a kind that is not known here."""
    if isinstance(module, nn.Linear | Convolution):
        return {1: 1} if name == "weight" else {}
    if isinstance(module, Transposed):
        return {0: module.groups} if name == "weight" else {}
    if isinstance(module, nn.Bilinear):
        return {1: 1, 2: 1} if name == "weight" else {}
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return {1: 1} if name.startswith("weight") else {}
    if isinstance(module, nn.MultiheadAttention):
        return {1: 1} if name.endswith("proj_weight") else {}
    if type(module).__name__ == "Conv1D":  # transformers' linear layer of GPT-2, (in, out)
        return {0: 1} if name == "weight" else {}
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return {}
    return None if tensor.ndim == 2 else {}


def labels_of(labels: Mapping[str, Tensor], models: int) -> Iterator[dict[str, Tensor]]:
    """Yield each model's part of labels that run over the units of all models."""
    for k in range(models):
        yield {group: becomes.chunk(models)[k] for group, becomes in labels.items()}
