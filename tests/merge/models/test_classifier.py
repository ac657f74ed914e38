"""Statistics by class of a head's inputs. References: the network run by hand, and numpy's moments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dimat.errors import ConfigError, MergeError
from dimat.merge.models.classifier import class_counts_of, class_statistics, read_features
from dimat.merge.shared_statistics import permuted
from dimat.symmetry import derive_symmetry, permute_weights, random_permutations
from tests.merge.methods import assert_same_bits


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)
    )


def batches(sizes: tuple[int, ...] = (9, 16, 5)) -> list[tuple[tuple[Tensor], Tensor]]:
    """Batches without examples of class 1."""
    g = torch.Generator().manual_seed(1)
    classes = torch.tensor([0, 2, 3])
    return [((torch.randn(n, 6, generator=g),), classes[torch.randint(3, (n,), generator=g)]) for n in sizes]


def test_statistics_are_the_moments_of_the_heads_inputs() -> None:
    """By hand: all but the last layer, in evaluation mode; the model's mode, weights and torch's draws stay."""
    model, data = network(), batches()
    model.train()
    before, draws = {k: t.clone() for k, t in model.state_dict().items()}, torch.random.get_rng_state()
    found = class_statistics(model, data, covariance="low-rank", rank=8)
    assert model.training
    assert_same_bits(dict(model.state_dict()), before)
    assert torch.equal(torch.random.get_rng_state(), draws)
    model.eval()
    with torch.no_grad():
        features = model[:-1](torch.cat([x for (x,), _ in data])).double().numpy()
    labels = torch.cat([y for _, y in data]).numpy()
    assert found["class_count.6.weight"].tolist() == np.bincount(labels, minlength=4).tolist()
    assert_same_bits({"class_count.6.weight": found["class_count.6.weight"]}, class_counts_of(model, data))
    for c in (0, 2, 3):
        own = features[labels == c]
        np.testing.assert_allclose(found["class_mean.6.weight"][c], own.mean(0), atol=1e-5)
        np.testing.assert_allclose(found["class_variance.6.weight"][c], own.var(0), atol=1e-5)
        factor = found["class_factor.6.weight"][c].double().numpy()
        np.testing.assert_allclose(factor.T @ factor, np.cov(own.T, bias=True), atol=1e-5)
    assert all(not tensor[1].any() for tensor in found.values())


def test_clipped_features_are_no_longer_than_the_clip() -> None:
    """By hand; a clip above all norms changes nothing."""
    model, data = network(), batches((30,))
    read = read_features(model, data)
    longest = float(read.features.norm(dim=1).max())
    plain = class_statistics(model, data)
    assert_same_bits(class_statistics(model, data, clip=2 * longest), plain)
    clip = longest / 3
    found = class_statistics(model, data, clip=clip)["class_mean.6.weight"]
    short = read.features * (clip / read.features.norm(dim=1, keepdim=True)).clamp_max(1)
    torch.testing.assert_close(found[2], short[read.labels == 2].mean(0))
    assert not torch.allclose(found, plain["class_mean.6.weight"])


def test_noise_is_as_large_as_said_and_cannot_be_told_from_the_seed() -> None:
    """Equal data give equal bits, other data another draw; its deviation is σ · clip / n, over many classes."""
    torch.manual_seed(0)
    model = nn.Linear(2, 400)
    x = 1 + torch.randn(4000, 2) / 2
    data = [((x,), torch.arange(400).repeat(10))]
    clip = 2 * float(x.norm(dim=1).max())
    plain, noisy, again = (class_statistics(model, data, clip=clip, noise=s) for s in (0.0, 0.01, 0.01))
    assert_same_bits(noisy, again)
    off = noisy["class_mean.weight"] - plain["class_mean.weight"]
    assert float(off.std()) == pytest.approx(0.01 * clip / 10, rel=0.1)
    moments = [t["class_variance.weight"] + t["class_mean.weight"].square() for t in (plain, noisy)]
    assert float((moments[1] - moments[0]).std()) == pytest.approx(0.01 * clip**2 / 10, rel=0.1)
    assert bool((noisy["class_variance.weight"] >= 0).all())
    other = [((x + 1e-6,), data[0][1])]
    elsewhere = class_statistics(model, other, clip=clip, noise=0.01)["class_mean.weight"]
    assert float((elsewhere - plain["class_mean.weight"] - off).std()) > 0.01 * clip / 10
    strong = class_statistics(model, data, clip=clip, noise=50.0)
    assert bool((strong["class_mean.weight"].norm(dim=1) <= clip * (1 + 1e-6)).all())
    assert bool((strong["class_variance.weight"].sum(1) <= clip**2 * (1 + 1e-6)).all())


@pytest.mark.parametrize("options", [{"noise": 0.1}, {"noise": 0.1, "clip": 1.0, "covariance": "low-rank"}])
def test_noise_without_a_bound_is_refused(options: dict[str, Any]) -> None:
    """Bad input: noise means nothing where one example may count without limit."""
    with pytest.raises(ConfigError, match="noise needs clip"):
        class_statistics(network(), batches(), **options)


def test_statistics_move_as_the_units_do() -> None:
    """Equivariance: statistics of the permuted network are the permuted statistics of the network."""
    model, data = network(), batches()
    spec = derive_symmetry(model.eval(), data[0][0])
    assert spec.groups
    moves = random_permutations(spec, torch.Generator().manual_seed(3))
    before = class_statistics(model, data, covariance="low-rank", rank=8)
    model.load_state_dict(permute_weights(model.state_dict(), spec, moves))
    after = class_statistics(model, data, covariance="low-rank", rank=8)
    moved = permuted(before, spec, moves)
    assert not torch.allclose(before["class_mean.6.weight"], after["class_mean.6.weight"])
    for name, tensor in after.items():
        one, two = (
            (t.mT @ t if name.startswith("class_factor.") else t) for t in (moved[name], tensor)
        )  # rows of a factor have no sign
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


class Part(nn.Linear):
    """A model trained in part: its state dict is the part."""

    def state_dict(self, *args: Any, **more: Any) -> dict[str, Any]:
        return {"bias": self.bias}


NO_HEAD = "need a classifier whose last layer is one nn.Linear"


@pytest.mark.parametrize(
    ("model", "targets", "said"),
    [
        (nn.Sequential(nn.Linear(6, 4), nn.LogSoftmax(1)), torch.zeros(5).long(), NO_HEAD),
        (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), torch.zeros(5).long(), NO_HEAD),
        (nn.Identity(), torch.zeros(5).long(), NO_HEAD),
        (Part(6, 4), torch.zeros(5).long(), "'weight' is not among the weights that are exchanged"),
        (Tied(), torch.zeros(5).long(), "is another layer's too"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), torch.zeros(5).long(), "is computed from others"),
        (nn.Linear(6, 4), torch.zeros(5), r"one class label for each example: targets are \[5\] of float32"),
        (nn.Linear(6, 4), torch.zeros(5, 4).long(), r"targets are \[5, 4\] of int64"),
        (nn.Linear(6, 4), torch.full((5,), 4), "labels from 0 to 3, the outputs of the head; targets go from 4 to 4"),
        (nn.Linear(6, 4), torch.full((5,), -100), "targets go from -100 to -100"),
    ],
)
def test_models_without_a_head_and_targets_without_classes_are_refused(
    model: nn.Module, targets: Tensor, said: str
) -> None:
    """Bad input: one line that says what is missing."""
    with pytest.raises(ConfigError, match=said) as caught:
        class_statistics(model, [((torch.randn(5, 6),), targets)])
    assert "\n" not in str(caught.value)


def test_no_examples_and_wild_features_are_errors() -> None:
    """Bad input: an empty pass, and weights that make features infinite."""
    with pytest.raises(MergeError, match="no examples for statistics by class"):
        class_statistics(network(), [])
    with pytest.raises(MergeError, match="the inputs of 'weight' are not finite"):
        class_statistics(nn.Linear(6, 4), [((torch.full((5, 6), torch.inf),), torch.zeros(5).long())])
