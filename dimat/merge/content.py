"""What weights hold as a hash: the same for all agents, whatever the strides, the device or the file."""

from __future__ import annotations

from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from dimat.merge.stages import Weights


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
