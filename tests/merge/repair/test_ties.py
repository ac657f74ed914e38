"""Repairs beside tensors that belong together. References: the model's own ties, and `torch.linalg.svd`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from dimat import merge_weights
from dimat.errors import ConfigError
from dimat.merge.models.classifier import class_statistics
from dimat.merge.registry import repair_registry


class Tied(nn.Module):
    """One matrix and one BatchNorm under two names each, and two layers under spectral normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.norm = self.twin = nn.BatchNorm1d(6)
        self.middle, self.last = spectral_norm(nn.Linear(6, 6)), spectral_norm(nn.Linear(6, 4))
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.twin(self.two(self.norm(self.one(x)).relu()))
        return self.head(self.last(self.middle(inner).relu()).relu())


def trained(seed: int) -> Tied:
    """A model whose u and v are those of its weights, and whose running statistics are those of some inputs."""
    torch.manual_seed(seed)
    model = Tied()
    with torch.no_grad():
        for _ in range(60):
            model(torch.randn(32, 6))
    return model.eval()


@pytest.mark.parametrize("repair", sorted(repair_registry.names()))
@pytest.mark.parametrize("accept", ["always", "no-worse"])
def test_what_belongs_together_does_so_after_a_repair(repair: str, accept: str) -> None:
    """Both names of a tensor and of running statistics are equal, and u, v are the leading singular vectors, also of
    a merge that goes only half of the way."""
    models = [trained(seed) for seed in (0, 1)]
    states = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    data = torch.randn(64, 6, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(64) % 4
    aux = [class_statistics(model, [((data,), labels)]) for model in models]
    own = states[0]

    def score(weights: dict[str, Tensor]) -> float:  # best half-way between own and the mean
        gone = (weights["one.weight"] - own["one.weight"]).norm() / (states[1]["one.weight"] - own["one.weight"]).norm()
        return 0.0 if gone > 0.3 else 1.0

    merged = merge_weights(
        own,
        [states[1]],
        [0.5, 0.5],
        "average",
        model=models[0],
        data=[(data,)],
        repair=repair,
        accept=accept,
        score=score if accept == "no-worse" else None,
        generator=torch.Generator().manual_seed(0),
        aux=aux if repair == "head" else None,
    )
    assert not torch.equal(merged["one.weight"], own["one.weight"])
    assert torch.equal(merged["two.weight"], merged["one.weight"])
    for kind in ("running_mean", "running_var", "weight", "bias", "num_batches_tracked"):
        assert torch.equal(merged[f"twin.{kind}"], merged[f"norm.{kind}"]), kind
    for layer in ("middle", "last"):
        weight, u, v = (merged[f"{layer}.parametrizations.weight.{part}"] for part in ("original", "0._u", "0._v"))
        assert float(u @ weight @ v) == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-4)


@pytest.mark.parametrize("kind", ["tied", "spectral"])
def test_a_head_that_is_not_its_own_is_not_refitted(kind: str) -> None:
    """A refit would change another layer, or a weight that is computed from others: it is refused."""
    torch.manual_seed(0)
    body = nn.Linear(4, 4)
    head: nn.Module = nn.Linear(4, 4) if kind == "tied" else spectral_norm(nn.Linear(4, 4))
    if kind == "tied":
        head.weight = body.weight
    model = nn.Sequential(body, nn.ReLU(), head)
    why = "is another layer's too" if kind == "tied" else "is computed from others"
    with pytest.raises(ConfigError, match=why):
        class_statistics(model, [((torch.randn(8, 4),), torch.arange(8) % 4)])
