"""BatchNorm re-estimation against torch itself and against exact moments."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dimat.errors import MergeError
from dimat.merge.repair.batchnorm import batchnorm


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6, momentum=0.3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(6, 5, 3, padding=1, bias=False),
        nn.BatchNorm2d(5, affine=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
        nn.BatchNorm1d(4),
    )


def images(sizes: list[int], seed: int = 1) -> list[tuple[Tensor, ...]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 3, 8, 8, generator=g) * 2 + 1,) for n in sizes]


def test_batch_mean_equals_torch_with_momentum_none() -> None:
    """Reference: torch's cumulative average (momentum=None) with dropout off, on batches of unequal size."""
    model, data = network(), images([16, 9, 16])
    expected = copy.deepcopy(model).eval()
    for layer in expected.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
    with torch.no_grad():
        for inputs in data:
            expected(*inputs)
    repaired = batchnorm(model.state_dict(), model=model, data=data, estimator="batch-mean")
    assert repaired.images == 41
    for name, tensor in expected.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(repaired.weights[name], tensor, rtol=1e-5, atol=1e-6)


def test_pooled_equals_moments_of_all_values() -> None:
    """Reference: mean and unbiased variance of all of a first layer's inputs at once, in float64."""
    model, data = network(), images([7, 16, 3])
    repaired = batchnorm(model.state_dict(), model=model, data=data)
    with torch.no_grad():
        values = torch.cat([model[0](*inputs) for inputs in data]).double()  # type: ignore[operator]
    mean = values.mean((0, 2, 3))
    torch.testing.assert_close(repaired.weights["1.running_mean"], mean.float(), rtol=1e-5, atol=1e-6)
    variance = values.transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(repaired.weights["1.running_var"], variance.float(), rtol=1e-5, atol=1e-6)


def test_one_batch_makes_training_and_evaluation_agree() -> None:
    """With one batch, evaluation with the repaired statistics is the batch-normalised forward pass itself."""
    model, data = network(), images([64])
    merged = copy.deepcopy(model)
    merged.load_state_dict(batchnorm(model.state_dict(), model=model, data=data).weights)
    own_statistics = copy.deepcopy(model).train()
    own_statistics[3].eval()  # type: ignore[index, operator, union-attr]
    with torch.no_grad():
        expected, got = own_statistics(*data[0]), merged.eval()(*data[0])
    torch.testing.assert_close(got, expected, rtol=0, atol=0.05)  # n / (n − 1) apart: 64 values in the last layer


def test_nothing_of_the_model_weights_or_random_state_changes() -> None:
    """Weights handed in, the model's tensors, modes, momenta, hooks and the global random state are as before."""
    model, data = network(), images([8])
    model.train()
    model[4].eval()  # type: ignore[index, operator, union-attr]
    before = copy.deepcopy(model)
    weights = {name: tensor.clone() for name, tensor in network(5).state_dict().items()}
    kept = copy.deepcopy(weights)
    state = torch.random.get_rng_state()
    batchnorm(weights, model=model, data=data)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(weights[name], tensor) for name, tensor in kept.items())
    for (name, now), (_, then) in zip(model.named_modules(), before.named_modules()):
        assert now.training == then.training, name
        assert getattr(now, "momentum", 0) == getattr(then, "momentum", 0), name
        assert not now._forward_hooks, name  # pyright: ignore[reportPrivateUsage]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values()))


def test_model_is_restored_after_an_error() -> None:
    """A forward pass that fails leaves mode and momentum as they were."""
    model = network().train()
    with pytest.raises(RuntimeError):
        batchnorm(model.state_dict(), model=model, data=[(torch.zeros(2, 99, 8, 8),)])
    assert all(module.training for module in model.modules())
    assert model[1].momentum == 0.3  # type: ignore[index, union-attr]


def test_only_running_statistics_change_and_counts_are_kept() -> None:
    """Everything but running means and variances is what was handed in, num_batches_tracked too."""
    model = network()
    weights = model.state_dict()
    repaired = batchnorm(weights, model=model, data=images([8])).weights
    for name, tensor in weights.items():
        assert torch.equal(repaired[name], tensor) == ("running" not in name), name


def test_a_shared_layer_pools_all_its_calls() -> None:
    """Reference: moments of both calls' inputs. One layer under two names is repaired under both."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.alias = self.norm

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.alias(10 * x)

    model, x = Twice(), torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    repaired = batchnorm(model.state_dict(), model=model, data=[(x,)]).weights
    both = torch.cat([x, 10 * x])
    for name in ("norm", "alias"):
        torch.testing.assert_close(repaired[f"{name}.running_mean"], both.mean(0))
        torch.testing.assert_close(repaired[f"{name}.running_var"], both.var(0))


def test_models_without_batchnorm_are_never_run() -> None:
    """No running statistics, no pass: data are not even looked at."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    repaired = batchnorm(model.state_dict(), model=model, data=None)
    assert repaired.images == 0
    assert all(torch.equal(repaired.weights[k], v) for k, v in model.state_dict().items())


def test_max_images_and_early_stop() -> None:
    """`max_images` cuts a batch; on identical batches only N − 1 changes, and the second look is content."""
    model, data = network(), images([64]) * 20
    assert batchnorm(model.state_dict(), model=model, data=images([40, 40]), max_images=50).images == 50
    assert batchnorm(model.state_dict(), model=model, data=data, stable_within=1e-2).images == 256
    assert batchnorm(model.state_dict(), model=model, data=data, stable_within=None).images == 1280


def test_a_last_batch_of_one_joins_the_one_before() -> None:
    """torch refuses to normalise one value per channel; 17 = 16 + 1 works all the same."""
    model, (x,) = network(), images([17])[0]
    split = batchnorm(model.state_dict(), model=model, data=[(x[:16],), (x[16:],)])
    whole = batchnorm(model.state_dict(), model=model, data=[(x,)])
    assert split.images == 17
    assert all(torch.equal(split.weights[k], whole.weights[k]) for k in whole.weights)


@pytest.mark.parametrize(("sizes", "fault"), [([], "empty"), ([1], "more than 1 value")])
def test_too_little_data_is_an_error(sizes: list[int], fault: str) -> None:
    """No batch at all, and one image where a layer sees one value per channel."""
    model = network()
    with pytest.raises(MergeError, match=fault):
        batchnorm(model.state_dict(), model=model, data=images(sizes))
    with pytest.raises(MergeError, match="needs data"):
        batchnorm(model.state_dict(), model=model, data=None)


def test_old_statistics_that_are_not_finite_do_not_matter() -> None:
    """They are thrown away; 0 · inf must not leak into the new ones."""
    model, data = network(), images([16])
    weights = dict(model.state_dict())
    expected = batchnorm(weights, model=model, data=data).weights
    weights["1.running_var"] = torch.full((6,), torch.inf)
    got = batchnorm(weights, model=model, data=data).weights
    assert all(torch.equal(got[k], expected[k]) for k in expected)
