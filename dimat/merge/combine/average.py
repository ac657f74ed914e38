"""Weighted average, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights


@combine_registry.register("average")
def average(own: Weights, peers: Sequence[Weights], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return θ = w_0 θ_own + Σ_k w_k θ_k, computed as θ_own + Σ_k w_k (θ_k − θ_own).

    `weights`: own first, sum 1. All floating-point tensors are averaged, BatchNorm's running statistics too;
    integer and boolean ones are own's. float32 accumulates in float64, half types in float32. Merging with
    equal copies returns own bit for bit, and so does weight 1 on self. Peers are read one tensor at a time.

    Paper: the consensus step of Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms?",
    NeurIPS 2017, arXiv 1705.09056 (there on whole models without alignment).
    """
    return {name: _mean(tensor, [peer[name] for peer in peers], weights[1:]) for name, tensor in own.items()}


def _mean(own: Tensor, peers: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    if not (own.is_floating_point() or own.is_complex()):
        return own.detach().clone()
    start = own.detach().to(_accumulator(own))
    total = start.clone()
    for peer, weight in zip(peers, weights):
        if weight:
            total.add_(peer.to(device=start.device, dtype=start.dtype) - start, alpha=weight)
    return total.to(own.dtype)


def _accumulator(tensor: Tensor) -> torch.dtype:
    if tensor.is_complex():
        return torch.complex128
    if tensor.dtype in (torch.float32, torch.float64) and tensor.device.type != "mps":  # MPS has no float64
        return torch.float64
    return torch.float32
