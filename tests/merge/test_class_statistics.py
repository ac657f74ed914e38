"""Gaussians by class. References: moments of all examples at once, by numpy, and moments of many draws."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dimat.errors import PeerError
from dimat.merge.class_statistics import ClassGaussians, check_classes, pooled
from dimat.merge.models.classifier import class_statistics

CLASSES, FEATURES = 4, 5


def examples(seed: int, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Features (N, d) with means and scales of their own, and labels: so many of each class."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    mixed = torch.randn(len(labels), FEATURES, generator=g) @ torch.randn(FEATURES, FEATURES, generator=g)
    return mixed + 2 * torch.randn(len(counts), FEATURES, generator=g)[labels], labels


def gaussians(features: Tensor, labels: Tensor, covariance: str = "low-rank") -> ClassGaussians:
    model = nn.Linear(FEATURES, CLASSES)
    return ClassGaussians.of(
        class_statistics(model, [((features,), labels)], covariance=covariance, rank=FEATURES),  # type: ignore[arg-type]
        "weight",
    )


def covariances(found: ClassGaussians) -> Tensor:
    rest = found.variance - found.factor.square().sum(1)
    return found.factor.mT @ found.factor + torch.diag_embed(rest)


@settings(max_examples=25, deadline=None)
@given(
    parts=st.lists(st.lists(st.integers(0, 7), min_size=CLASSES, max_size=CLASSES), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_pooled_statistics_are_those_of_the_pooled_examples(parts: list[list[int]], seed: int) -> None:
    """Law: counts, means and whole covariances, with classes that some or all parts lack. By numpy, in float64."""
    drawn = [examples(seed + k, counts) for k, counts in enumerate(parts) if sum(counts)]
    if not drawn:
        return
    found = pooled([gaussians(*each) for each in drawn])
    features, labels = (torch.cat(both).numpy() for both in zip(*drawn))
    assert found.count.tolist() == np.bincount(labels, minlength=CLASSES).tolist()
    for c in range(CLASSES):
        own = features[labels == c].astype(np.float64)
        mean = own.mean(0) if len(own) else np.zeros(FEATURES)
        matrix = np.cov(own.T, bias=True) if len(own) else np.zeros((FEATURES, FEATURES))
        np.testing.assert_allclose(found.mean[c], mean, atol=1e-4)
        np.testing.assert_allclose(covariances(found)[c], matrix, atol=1e-3)


def test_pooled_diagonals_keep_what_lies_between_the_parts() -> None:
    """The covariance of the parts' means is exact, off the diagonal too, where each part tells variances alone."""
    drawn = [examples(k, [6, 3, 0, 1]) for k in range(3)]
    parts = [gaussians(*each, covariance="diagonal") for each in drawn]
    found = covariances(pooled(parts))
    shares = torch.stack([part.count for part in parts])[:, 0] / 18
    means = torch.stack([part.mean[0] for part in parts])
    off = means - shares @ means
    expected = torch.einsum("k,ki,kj->ij", shares, off, off) + sum(
        share * part.variance[0].diag() for share, part in zip(shares, parts)
    )
    torch.testing.assert_close(found[0], expected)
    assert float((found[0] - found[0].diagonal().diag()).abs().max()) > 0.1


def test_draws_have_the_moments_of_their_class() -> None:
    """By the law of large numbers, within five standard errors; equal generators draw equal bits."""
    found = gaussians(*examples(3, [40, 0, 40, 40]))
    drawn = found.draw([0, 3], 20_000, torch.Generator().manual_seed(1))
    assert drawn.shape == (40_000, FEATURES)
    for k, c in enumerate((0, 3)):
        part = drawn[k * 20_000 : (k + 1) * 20_000]
        assert bool(((part.mean(0) - found.mean[c]).abs() < 5 * (found.variance[c] / 20_000).sqrt()).all())
        scale = found.variance[c].sqrt()
        off = (torch.cov(part.T) - covariances(found)[c]) / torch.outer(scale, scale)
        assert float(off.abs().max()) < 5 * (2 / 20_000) ** 0.5
    assert torch.equal(drawn, found.draw([0, 3], 20_000, torch.Generator().manual_seed(1)))


def told(seed: int = 0) -> dict[str, Tensor]:
    features, labels = examples(seed, [5, 0, 9, 2])
    model = nn.Linear(FEATURES, CLASSES)
    return class_statistics(model, [((features,), labels)], covariance="low-rank", rank=2)


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        ("class_count.", lambda t: -t, "holds counts that are not whole, negative or above 256"),
        ("class_count.", lambda t: t.float(), "holds counts that are not whole, negative or above 256"),
        ("class_count.", lambda t: t + 2**62, "holds counts that are not whole, negative or above 256"),
        ("class_count.", lambda t: t * 0 + 100, "counts 400 examples, more than 256; agents must have the same"),
        ("class_count.", lambda t: t[:3], r"is \[3\], expected \[4\]"),
        ("class_mean.", lambda t: t[None], r"is \[1, 4, 5\], expected \[4, 5\]"),
        ("class_mean.", lambda t: t * torch.nan, "holds values that are not finite numbers"),
        ("class_mean.", lambda t: t.to(torch.float8_e4m3fn), "holds values that are not finite numbers"),
        ("class_mean.", lambda t: t + 0j, "holds values that are not finite numbers"),
        ("class_mean.", lambda t: t.long(), "holds values that are not finite numbers"),
        ("class_mean.", lambda t: t * 1e6, "has features .* times as large as the agent's own, more than 10 times"),
        (
            "class_mean.",
            lambda t: t * 0 + 3e38,
            "has features .* times as large as the agent's own, more than 10 times",
        ),
        ("class_variance.", lambda t: t - 1e-3, "holds variances below 0"),
        ("class_variance.", lambda t: t + torch.inf, "holds values that are not finite numbers"),
        ("class_variance.", lambda t: t * 1e9, "has features .* times as large as the agent's own, more than 10 times"),
        ("class_factor.", lambda t: t * 3, "is larger than the variances beside it"),
        ("class_factor.", lambda t: t[:, :1], r"is \[4, 1, 5\], expected \[4, 2, 5\]"),
        ("class_factor.", lambda t: t[0], r"is \[2, 5\], expected \[4, 2, 5\]"),
    ],
)
def test_statistics_that_cannot_be_right_are_refused(key: str, change: object, said: str) -> None:
    """Bad input from a peer: one line that names it and the statistic, never another error."""
    assert callable(change)
    own, ours, theirs = nn.Linear(FEATURES, CLASSES).state_dict(), told(0), told(1)
    check_classes("eve", theirs, own, ours, 256)
    theirs[f"{key}weight"] = change(theirs[f"{key}weight"])
    with pytest.raises(PeerError, match=rf"^eve: statistic 'class_\w+\.weight' .*{said}") as caught:
        check_classes("eve", theirs, own, ours, 256)
    assert "\n" not in str(caught.value)


def test_statistics_of_no_tensor_of_ours_are_refused() -> None:
    """Where nothing is expected too, as in merges of files, shapes go by the weight that a statistic names."""
    own = nn.Linear(FEATURES, CLASSES).state_dict()
    for key, said in (("class_mean.gone", "belongs to no tensor of the model"), ("class_mean.bias", r"expected \[\]")):
        with pytest.raises(PeerError, match=said):
            check_classes("eve", {key: torch.ones(4, 5)}, own, {}, 256)
    with pytest.raises(PeerError, match=re.escape("'class_mean.weight' came without its counts and variances")):
        check_classes("eve", {"class_mean.weight": torch.ones(4, 5)}, own, {}, 256)
    wide = told() | {"class_factor.weight": torch.zeros(4, 6, 5)}
    with pytest.raises(PeerError, match=r"is \[4, 6, 5\], expected \[4, 5, 5\]"):
        check_classes("eve", wide, own, {}, 256)
