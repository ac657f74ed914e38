"""Distances between whole models, from a small matrix of inner products of their tensors.

With δ_k = θ_k − θ_own (so δ_0 = 0) and G[k, l] = ⟨δ_k, δ_l⟩ over all floating-point tensors, any convex mix of
models Σ_k c_k θ_k has the squared distance (c − e_j)ᵀ G (c − e_j) from model j. So a method that searches for
its mix reads the models twice: once for G, once for the sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dimat.errors import MergeError
from dimat.merge.stages import Weights

BLOCK = 1 << 18
"""Coordinates that are multiplied at a time."""


def inner_products(own: Weights, peers: Sequence[Weights]) -> Tensor:
    """Return G[k, l] = ⟨θ_k − θ_own, θ_l − θ_own⟩, own first: (models, models), float64, on the CPU.

    Over all floating-point tensors, running statistics too. One tensor of each peer is in memory at a time.
    Raises MergeError naming a tensor and a model where a value is not finite.
    """
    total = torch.zeros(len(peers) + 1, len(peers) + 1, dtype=torch.float64)
    for name, tensor in own.items() if peers else ():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        start = _flat(tensor)
        others = [_flat(peer[name].to(tensor.device)) for peer in peers]
        products = torch.zeros(len(peers), len(peers), dtype=torch.float64)
        for first in range(0, start.numel(), BLOCK):
            block = slice(first, first + BLOCK)
            left = _double(start[block])
            deltas = torch.stack([_double(other[block]) - left for other in others])
            products += (deltas @ deltas.mT).cpu()
        if not products.isfinite().all():
            at = int((~products.diagonal().isfinite()).nonzero()[0])
            who = f"peer {at}" if start.isfinite().all() else "own weights"
            raise MergeError(f"tensor {name!r} of {who} holds values that are not finite or too large to be squared")
        total[1:, 1:] += products
    return total


def squared_distances(products: Tensor) -> Tensor:
    """Return ‖θ_k − θ_l‖² of all pairs from `inner_products`: (models, models), zeros on the diagonal."""
    squares = products.diagonal()
    distances = (squares[:, None] + squares[None, :] - 2 * products).clamp_min_(0)
    return distances.fill_diagonal_(0)


def distances_from(mix: Tensor, products: Tensor) -> Tensor:
    """Return ‖Σ_k c_k θ_k − θ_j‖ for each model j, c = `mix`, own first, with sum 1: (models,)."""
    gaps = mix[None, :] - torch.eye(len(mix), dtype=mix.dtype)
    return ((gaps @ products) * gaps).sum(1).clamp_min_(0).sqrt_()


def _flat(tensor: Tensor) -> Tensor:
    values = tensor.detach()
    return (torch.view_as_real(values.resolve_conj()) if values.is_complex() else values).reshape(-1)


def _double(values: Tensor) -> Tensor:
    return (values.cpu() if values.device.type == "mps" else values).double()  # MPS has no float64
