"""What the tests of OPCM share: the golden models, and the formulas written plainly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dimat.merge.combine.opcm import opcm

GOLDEN = Path(__file__).parents[1] / "golden"
FACTS = json.loads((GOLDEN / "opcm.json").read_text())
VARIANTS = {"fork_diagnoop": False, "upstream_diagzero": True}
Model = dict[str, Tensor]


def part(tensors: Model, prefix: str) -> Model:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


TENSORS = load_file(GOLDEN / "opcm_mlp.safetensors")
BASE = part(TENSORS, "in.base.")
TASKS = [part(TENSORS, f"in.task{k}.") for k in range(4)]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_projection(delta: Tensor, merged: Tensor, alpha: float, diagonal: bool) -> tuple[Tensor, int]:
    """The definition, by a full SVD: C = U A Vᵀ with A[:k, :k] = 0, and its diagonal too."""
    u, sigma, vh = torch.linalg.svd(merged, full_matrices=True)
    rank = int((sigma > sigma.max() * 1e-12).sum()) if sigma.numel() else 0
    above = (sigma.cumsum(0) / sigma.sum() > alpha).nonzero().flatten() if rank else torch.zeros(0)
    k = rank if alpha == 1 or not len(above) else int(above[0])
    a = u.T @ delta @ vh.T
    a[:k, :k] = 0
    if diagonal:
        a.diagonal()[:rank] = 0
    return u @ a @ vh, k


def plain_fold(base: Model, models: Sequence[Model], alpha: float, diagonal: bool) -> tuple[Model, float]:
    """The definition, tensor by tensor and step by step with λ in between; matrices are those of ≥ 2 dimensions."""
    deltas = [{name: model[name].double() - base[name].double() for name in base} for model in models]

    def norm(tensors: Model) -> float:
        return sum(float(t.square().sum()) for t in tensors.values()) ** 0.5

    merged, factor = deltas[0], 1.0
    for count in range(2, len(deltas) + 1):
        delta, y = deltas[count - 1], {}
        for name, tensor in delta.items():
            if tensor.ndim < 2:
                y[name] = factor * merged[name] + tensor
            else:
                rows = merged[name].flatten(1), tensor.flatten(1)
                new, _ = plain_projection(rows[1], rows[0], alpha, diagonal)
                y[name] = factor * merged[name] + new.reshape(tensor.shape)
        factor = norm(y) / (sum(norm(d) for d in deltas[:count]) / count)
        merged = {name: tensor / factor for name, tensor in y.items()}
    return {name: base[name].double() + merged[name] for name in base}, factor


def stream(state: dict[str, Any], name: str, model: Model, base: Model = BASE, **options: Any) -> Model:
    """Fold one update of one peer into a stream, without own weights."""
    return opcm(base, [model], [0.0, 1.0], base=base, state=state, names=[name], mode="stream", **options)


def merged_delta(state: dict[str, Any]) -> Model:
    return part({k: v for k, v in state.items() if isinstance(v, Tensor)}, "opcm/merged/")


def length(delta: Model) -> float:
    return sum(float(t.double().square().sum()) for t in delta.values()) ** 0.5


def assert_close(got: Model, expected: Model, tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.numel():
            error = (got[name].double() - tensor.double()).abs().max()
            assert error <= tolerance * max(float(tensor.double().abs().max()), 1e-30), f"{name}: {error}"


def assert_bits(got: Model, expected: Model) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name
        assert torch.equal(got[name].signbit(), tensor.signbit()), name
