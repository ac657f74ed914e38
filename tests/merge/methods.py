"""What the tests of combine methods share: states, and the rules that hold for every method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights

GOLDEN = Path(__file__).parents[1] / "golden"


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A state dict with tensors of all kinds."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "conv": (6, 3, 2, 2),
        "depthwise": (6, 1, 3, 3),
        "linear": (8, 5),
        "row": (1, 5),
        "one": (1,),
        "scalar": (),
        "bias": (8,),
    }
    floats = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    return {
        **floats,
        "strided": torch.randn(7, 4, generator=g).to(dtype).T,
        "empty": torch.zeros(0, 3, dtype=dtype),
        "count": torch.randint(0, 100, (), generator=g),
        "mask": torch.rand(3, generator=g) > 0.5,
    }


def fishers(seed: int) -> dict[str, Tensor]:
    """Statistics that fit `state`: Fisher diagonals and a Gram matrix."""
    g = torch.Generator().manual_seed(1000 + seed)
    drawn = {f"fisher.{n}": torch.rand(t.shape, generator=g) for n, t in state(0).items() if t.is_floating_point()}
    x = torch.randn(20, 5, generator=g)
    return {**drawn, "gram.linear": x.T @ x}


def combine(
    method: str,
    own: Weights,
    peers: Sequence[Weights],
    weights: Sequence[float],
    aux: Sequence[Weights] | None = None,
    base: Weights | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Call a combine method as the pipeline does. Base and statistics that fit `state` are filled in."""
    if base is None and "linear" in own:
        base = state(99, own["linear"].dtype)
    if aux is None and "linear" in own:
        aux = [fishers(k) for k in range(len(weights))]
    return dict(combine_registry.call(method, options, own, peers, weights, base=base, aux=aux))


def assert_same_bits(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def worst(found: Weights, expected: Weights) -> float:
    """Largest difference, in units of the largest entry of the tensor."""
    errors = [
        float((found[n].double() - t.double()).abs().max() / t.double().abs().max().clamp_min(1e-30))
        for n, t in expected.items()
        if t.is_floating_point() and t.numel()
    ]
    return max(errors)


def part(tensors: Weights, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def golden_mlp() -> tuple[dict[str, Tensor], list[dict[str, Tensor]], dict[str, Tensor]]:
    """The base, the four tasks, and the reference's outputs."""
    inputs = load_file(GOLDEN / "opcm_mlp.safetensors")
    tasks = [part(inputs, f"in.task{k}.") for k in range(4)]
    return part(inputs, "in.base."), tasks, load_file(GOLDEN / "fusionbench_mlp.safetensors")


class Counted(Mapping[str, Tensor]):
    """Weights that list what is read."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.reads: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)
