"""Means and deviations of units restored. References: statistics taken here by other hooks; the models themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from dimat import merge_weights
from dimat.errors import MergeError
from dimat.merge.growth import Reference
from dimat.merge.repair.batchnorm import batchnorm
from dimat.merge.repair.variance import SIZE, variance
from tests.merge.methods import assert_same_bits

X = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 2, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, groups=2, bias=False),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(150, 12),
        nn.LayerNorm(12),
        nn.Linear(12, 4),
    )


def states(make: Callable[[], nn.Module], count: int = 2) -> list[dict[str, Tensor]]:
    found: list[dict[str, Tensor]] = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = make()
        found.append({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
    return found


def mean(models: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    return {n: sum(w * m[n] for m, w in zip(models, weights, strict=True)) for n in models[0]}  # type: ignore[misc]


def outputs(model: nn.Module, weights: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Return the outputs of all leaves by name, units first."""
    model.load_state_dict(dict(weights))
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: object, output: Tensor) -> None:
            axis = -1 if isinstance(module, nn.Linear) or output.ndim == 2 else 1
            found[name] = output.detach().double().movedim(axis, 0).flatten(1)

        return hook

    handles = [m.register_forward_hook(keep(n)) for n, m in model.named_modules() if not [*m.children()]]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return found


def test_units_have_the_interpolated_statistics_of_the_models() -> None:
    """Layer by layer, in the repaired network itself: means with a bias, root mean squares without; the layer that
    makes the output stays as it is, and so do model, weights and random state."""
    models, weights = states(convolutions), [0.3, 0.7]
    model = convolutions()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = mean(models, weights)
    before = torch.random.get_rng_state()
    options = {"bound": 1e6, "ridge": 1e-9}
    repaired = variance(merged, model=model, data=[(X[:50],), (X[50:],)], models=models, mixing=weights, **options)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert_same_bits(model.state_dict(), kept)
    assert repaired.images == len(X)
    for name in ("9.weight", "9.bias", "8.weight", "8.bias"):
        assert torch.equal(repaired.weights[name], merged[name])
    now, *own = (outputs(convolutions(), each, X) for each in (repaired.weights, *models))
    for layer, biased in (("0", True), ("2", True), ("4", False), ("7", True)):

        def goal(of: Callable[[Tensor], Tensor], layer: str = layer) -> Tensor:
            return sum(w * of(each[layer]) for w, each in zip(weights, own, strict=True))  # type: ignore[return-value]

        if biased:
            torch.testing.assert_close(now[layer].mean(1), goal(lambda z: z.mean(1)), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                now[layer].std(1, correction=0), goal(lambda z: z.std(1, correction=0)), rtol=1e-4, atol=1e-5
            )
        else:
            squares = torch.hypot(goal(lambda z: z.mean(1)), goal(lambda z: z.std(1, correction=0)))
            torch.testing.assert_close(now[layer].square().mean(1).sqrt(), squares, rtol=1e-4, atol=1e-5)


def test_a_network_that_is_its_own_merge_stays() -> None:
    """Reference: the weights themselves, of one model, of equal models, and of one whose peer has no weight."""
    one, other = states(convolutions)
    for models, weights in (([one], [1.0]), ([one, one], [0.4, 0.6]), ([one, other], [1.0, 0.0])):
        repaired = variance(one, model=convolutions(), data=[(X,)], models=models, mixing=weights)
        for name, tensor in repaired.weights.items():
            torch.testing.assert_close(tensor, one[name], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_folded_stays() -> None:
    """Layers that share a weight, run twice or never, or compute their weight; an exchanged part without them."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.tied, self.twice = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.tied.weight = self.one.weight
            self.never, self.spectral, self.plain = nn.Linear(8, 8), spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.twice(self.twice(self.tied(self.one(x).relu()).relu()).relu())
            return self.head(self.plain(self.spectral(x).relu()).relu())

    models = states(Odd)
    merged = mean(models, [0.5, 0.5])
    x = X[:, 0, 0]
    repaired = variance(merged, model=Odd(), data=[(x,)], models=models, mixing=[0.5, 0.5]).weights
    changed = {name for name, tensor in repaired.items() if not torch.equal(tensor, merged[name])}
    assert changed == {"plain.weight", "plain.bias"}
    part = {name: tensor for name, tensor in merged.items() if not name.startswith("plain")}
    left = variance(part, model=Odd(), data=[(x,)], models=models, mixing=[0.5, 0.5]).weights
    assert_same_bits(left, part)


def test_batchnorm_is_re_estimated_as_by_batchnorm() -> None:
    """A layer before a BatchNorm may have any scale: the function is that of `batchnorm` alone."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))

    models = states(make)
    merged = mean(models, [0.5, 0.5])
    merged["1.num_batches_tracked"] = models[0]["1.num_batches_tracked"]
    one, other = make(), make()
    one.load_state_dict(variance(merged, model=make(), data=[(X,)], models=models, mixing=[0.5, 0.5]).weights)
    other.load_state_dict(batchnorm(merged, model=make(), data=[(X,)]).weights)
    with torch.no_grad():
        torch.testing.assert_close(one.eval()(X), other.eval()(X), rtol=1e-3, atol=1e-4)


def test_layers_behind_a_batchnorm_get_what_it_gives_once_it_is_re_estimated() -> None:
    """Reference: the models' own statistics of a hidden layer behind a BatchNorm, in the network as it ends."""

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Linear(3, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)
        )

    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(3))
    models = [batchnorm(state, model=make(), data=[(x,)]).weights for state in states(make)]
    merged = mean(models, [0.5, 0.5])
    merged["1.num_batches_tracked"] = models[0]["1.num_batches_tracked"]
    options = {"bound": 1e6, "ridge": 1e-9}
    repaired = variance(merged, model=make(), data=[(x,)], models=models, mixing=[0.5, 0.5], **options).weights
    now, *own = (outputs(make(), each, x)["3"] for each in (repaired, *models))
    for of in (lambda z: z.mean(1), lambda z: z.std(1, correction=0)):
        torch.testing.assert_close(of(now), (of(own[0]) + of(own[1])) / 2, rtol=0.02, atol=0.01)


def test_a_layer_under_two_names_is_repaired_under_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(8, 8), nn.Linear(8, 2)
            self.layers = nn.Sequential(self.first, nn.ReLU(), self.out)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    models = states(Twice)
    merged = mean(models, [0.5, 0.5])
    repaired = variance(merged, model=Twice(), data=[(X[:, 0, 0],)], models=models, mixing=[0.5, 0.5]).weights
    assert not torch.equal(repaired["first.weight"], merged["first.weight"])
    for kind in ("weight", "bias"):
        assert torch.equal(repaired[f"first.{kind}"], repaired[f"layers.0.{kind}"])
        assert torch.equal(repaired[f"out.{kind}"], merged[f"out.{kind}"])


@pytest.mark.parametrize("end", ["squeezed", "softened", "in a table", "in a tuple"])
def test_the_layer_of_the_output_stays_however_it_is_given(end: str) -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 1 if end == "squeezed" else 3)

        def forward(self, x: Tensor) -> object:
            logits = self.head(self.body(x).relu())
            given = {"in a table": {"logits": logits}, "in a tuple": (logits, x), "squeezed": logits.squeeze(-1)}
            return given.get(end, logits.log_softmax(-1))

    models = states(Ends)
    merged = mean(models, [0.5, 0.5])
    repaired = variance(merged, model=Ends(), data=[(X[:, 0, 0],)], models=models, mixing=[0.5, 0.5]).weights
    changed = {name for name, tensor in repaired.items() if not torch.equal(tensor, merged[name])}
    assert changed == {"body.weight", "body.bias"}


def test_a_model_that_draws_in_evaluation_is_repaired_alike_each_time() -> None:
    """The process's stream neither decides nor moves."""

    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(F.dropout(self.one(x), 0.5, True).relu())

    models = states(Draws)
    merged = mean(models, [0.5, 0.5])
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(variance(merged, model=Draws(), data=[(X[:, 0, 0],)], models=models, mixing=[0.5, 0.5]).weights)
    assert_same_bits(found[0], found[1])


def test_a_dead_unit_does_not_explode_and_weights_stay_within_bounds() -> None:
    """Two units that cancel: what is left is rounding; it grows by `bound` at most, and by `SIZE` in all."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))

    one, _ = states(make)
    other = {**one, "0.weight": -one["0.weight"], "0.bias": -one["0.bias"]}
    merged = {name: (one[name] + other[name]) / 2 + 1e-12 for name in one}
    x = X[:, :, 0, 0]
    repaired = variance(merged, model=make(), data=[(x,)], models=[one, other], mixing=[0.5, 0.5]).weights
    assert all(tensor.isfinite().all() for tensor in repaired.values())
    assert float(repaired["0.weight"].abs().max()) <= 4e-12 * (1 + 1e-3)
    norms = {name: float(tensor.norm()) / 10 for name, tensor in one.items()}
    small = Reference(norms, {name: one[name].numel() for name in norms}, dict.fromkeys(norms, 0.0))
    tenth = {name: one[name] / 10 if name == "0.weight" else one[name] for name in one}
    free, bounded = (
        variance(tenth, model=make(), data=[(x,)], models=[one], mixing=[1.0], reference=reference).weights["0.weight"]
        for reference in (None, small)
    )
    assert float(free.norm()) > 1.5 * SIZE * norms["0.weight"]
    assert float(bounded.norm()) <= SIZE * norms["0.weight"] * (1 + 1e-6)


def test_it_lowers_the_loss_of_an_aligned_merge_of_networks_trained_apart() -> None:
    """Plain networks on one problem: their variance collapses from layer to layer (.132 nats become .036)."""
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
    y = (x @ torch.randn(6, 4, generator=torch.Generator().manual_seed(2))).argmax(1)

    def make() -> nn.Module:
        hidden = [layer for _ in range(3) for layer in (nn.Linear(48, 48), nn.ReLU())]
        return nn.Sequential(nn.Linear(6, 48), nn.ReLU(), *hidden, nn.Linear(48, 4))

    found: list[dict[str, Tensor]] = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        found.append({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
    losses: dict[str, float] = {}
    for repair in ("none", "variance"):
        model, stages = make(), {"align": "activations", "repair": repair}
        merged = merge_weights(found[0], [found[1]], [0.5, 0.5], "average", model=make(), data=[(x,)], **stages)
        model.load_state_dict(merged)
        with torch.no_grad():
            losses[repair] = float(F.cross_entropy(model(x), y))
    assert losses["variance"] < 0.6 * losses["none"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"model": None, "data": [(X,)]}, "runs the models: pass model and data"),
        ({"model": convolutions(), "data": None}, "runs the models: pass model and data"),
        ({"model": convolutions(), "data": [(X,)]}, "is a part of merging only"),
        ({"model": convolutions(), "data": [], "models": [{}], "mixing": [1.0]}, "the data to repair with are empty"),
    ],
)
def test_missing_inputs_are_told(given: dict[str, object], told: str) -> None:
    with pytest.raises(MergeError, match=told):
        variance(states(convolutions)[0], **given)  # type: ignore[arg-type]
