"""Learned coefficients: AdaMerging and Self Positioning, and the gradient that both rest on.

References: finite differences in float64, task arithmetic, planted answers, and what must not change.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dimat.errors import MergeError
from dimat.merge.combine import adamerging as adamerging_module
from dimat.merge.combine import self_positioning as self_positioning_module
from dimat.merge.combine.self_positioning import _spherical
from dimat.merge.combine.task_arithmetic import task_arithmetic
from dimat.merge.models.learned import Span, batches_of, cross_entropy, descend
from dimat.merge.registry import combine_registry
from dimat.merge.tensors.task_vectors import participants_of
from dimat.simulate import run_simulation
from tests.merge.methods import assert_same_bits, worst
from tests.merge.networks import ResNet, randomise
from tests.simulate.helpers import tiny_experiment

Model = dict[str, Tensor]
LEARNED = ["adamerging", "self-positioning"]


def adamerging(*args: Any, **options: Any) -> Model:
    """AdaMerging, all tensors at once."""
    return dict(adamerging_module.adamerging(*args, **options))


def self_positioning(*args: Any, **options: Any) -> Model:
    """Self Positioning, all tensors at once."""
    return dict(self_positioning_module.self_positioning(*args, **options))


COMBINE: dict[str, Callable[..., Model]] = {"adamerging": adamerging, "self-positioning": self_positioning}
MIXING = [0.5, 0.3, 0.2]


def network() -> nn.Module:
    """An MLP of float64, so that finite differences tell something."""
    layers = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Dropout(0.5), nn.Linear(10, 4)).double()
    return randomise(layers, 0)


def changed(base: Model, seed: int, scale: float = 0.3) -> Model:
    g = torch.Generator().manual_seed(seed)
    return {n: t + scale * torch.randn(t.shape, generator=g, dtype=t.dtype) for n, t in base.items()}


def inputs(seed: int = 5, count: int = 40) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state(model: nn.Module) -> Model:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def entropy(model: nn.Module, weights: Model, x: Tensor) -> float:
    with torch.no_grad():
        return float(cross_entropy(torch.func.functional_call(model.eval(), weights, (x,))))


@pytest.mark.parametrize("directions", [None, lambda deltas: [d.clamp(-0.1, 0.2) for d in deltas]])
def test_the_gradient_by_coefficients_is_that_of_finite_differences(directions: Any) -> None:
    """Each coefficient, moved by ±1e-6, moves the entropy by its entry of the gradient; float64."""
    model, x = network(), inputs()
    base = state(model)
    cast = participants_of(changed(base, 1), [changed(base, 2), changed(base, 3)], MIXING)
    assert cast is not None
    span = Span(cast, base, model, -1, directions)
    point = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, found = span.gradient(point, (x,), cross_entropy)
    assert value == pytest.approx(float(cross_entropy(span.logits(point, (x,)))), rel=1e-12)
    for place in torch.cartesian_prod(torch.arange(3), torch.arange(4)).tolist():
        step = torch.zeros_like(point)
        step[tuple(place)] = 1e-6
        high, low = (float(cross_entropy(span.logits(point + s * step, (x,)))) for s in (1, -1))
        assert float(found[tuple(place)]) == pytest.approx((high - low) / 2e-6, rel=1e-4, abs=1e-8)


def test_a_slerp_of_three_is_that_of_whole_vectors() -> None:
    """Reference: the formula on the vectors themselves, longest first; and its gradient by finite differences."""
    g = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, 50, generator=g, dtype=torch.float64) * torch.tensor([[1.0], [3.0], [2.0]])
    a = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)

    def slerp(u: Tensor, v: Tensor, t: float) -> Tensor:
        angle = (u @ v / (u.norm() * v.norm())).acos()
        return (((1 - t) * angle).sin() * u + (t * angle).sin() * v) / angle.sin()

    gram = vectors @ vectors.T
    expected = slerp(slerp(vectors[1], vectors[2], 0.3 / 0.8), vectors[0], 0.2)
    torch.testing.assert_close(_spherical(a, gram) @ vectors, expected, rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(lambda a: _spherical(a, gram), (a.requires_grad_(),))


def test_slerp_of_parallel_opposite_and_zero_vectors_is_finite() -> None:
    """Where there is no angle, the straight line; equal vectors give themselves."""
    vectors = torch.tensor([[3.0, 4.0], [3.0, 4.0], [-3.0, -4.0], [0.0, 0.0]], dtype=torch.float64)
    gram = vectors @ vectors.T
    for pair in ([0, 1], [0, 2], [0, 3], [3, 3]):
        c = _spherical(torch.tensor([0.5, 0.5], dtype=torch.float64), gram[pair][:, pair])
        torch.testing.assert_close(c.sum(), torch.tensor(1.0, dtype=torch.float64))
    equal = _spherical(torch.tensor([0.7, 0.3], dtype=torch.float64), gram[[0, 1]][:, [0, 1]])
    torch.testing.assert_close(equal @ vectors[:2], vectors[0])


@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_entropy_falls_and_no_steps_are_task_arithmetic(granularity: str) -> None:
    """More steps, less entropy on the data; λ stays in [0, 1]; λ = scaling · w at the start."""
    model, x = network(), inputs()
    base = state(model)
    own, peers = changed(base, 1), [changed(base, 2), changed(base, 3)]
    given: dict[str, Any] = {"base": base, "model": model, "data": [(x,)], "granularity": granularity, "lr": 0.01}
    start = adamerging(own, peers, MIXING, steps=0, scaling=1.5, **given)
    assert worst(start, task_arithmetic(own, peers, MIXING, base=base, scaling=1.5)) < 1e-12
    steps = [entropy(model, adamerging(own, peers, MIXING, steps=n, **given), x) for n in (0, 10, 40)]
    assert steps[0] > steps[1] > steps[2]
    clamped = adamerging(own, peers, MIXING, steps=0, scaling=9.0, **given)
    assert worst(clamped, task_arithmetic(own, peers, MIXING, base=base, weights=[1.0, 1.0, 1.0])) < 1e-12


def blobs(seed: int, count: int = 120) -> tuple[Tensor, Tensor]:
    """Three well separated classes in six dimensions."""
    g = torch.Generator().manual_seed(seed)
    centres = 3.0 * torch.eye(6)[:3]
    labels = torch.arange(count) % 3
    return centres[labels] + 0.5 * torch.randn(count, 6, generator=g), labels


def planted() -> tuple[nn.Module, Model, Model, Model, Tensor, Tensor]:
    """A base, a model that was trained from it, one that is noise around it, and data."""
    x, y = blobs(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        base = state(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model, base, state(model), changed(base, 9, 0.4), x, y


def share_of(found: Model, base: Model, good: Model, bad: Model, name: str) -> tuple[float, float]:
    """Return the coefficients of the good and the bad model's delta in a merged tensor, by least squares."""
    deltas = torch.stack([(m[name] - base[name]).flatten().double() for m in (good, bad)], 1)
    solved = torch.linalg.lstsq(deltas, (found[name] - base[name]).flatten().double()[:, None]).solution
    return float(solved[0]), float(solved[1])


@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_adamerging_leaves_a_peer_of_noise_out(granularity: str) -> None:
    """Planted: own is trained, the peer is noise; its coefficient ends at about 0, own's does not."""
    model, base, good, bad, x, y = planted()
    given: dict[str, Any] = {"base": base, "model": model, "data": [(x,)], "granularity": granularity, "lr": 0.01}
    found = adamerging(good, [bad], [0.5, 0.5], steps=300, **given)
    for name in ("0.weight", "2.weight"):
        kept, left = share_of(found, base, good, bad, name)
        assert left < 0.1
        assert kept > 0.7
    right = (torch.func.functional_call(model, found, (x,)).argmax(1) == y).float().mean()
    assert right > 0.97


@pytest.mark.parametrize("interpolation", ["slerp", "linear"])
def test_self_positioning_by_score_leaves_a_peer_of_noise_out(interpolation: str) -> None:
    """The score is minus the labelled loss, as in the paper; the peer of noise keeps a small share of own's."""
    model, base, good, bad, x, y = planted()

    def score(weights: Any) -> float:
        return -float(F.cross_entropy(torch.func.functional_call(model, dict(weights), (x,)), y))

    given: dict[str, Any] = {"base": base, "model": model, "score": score, "objective": "score", "steps": 120}
    found = self_positioning(good, [bad], [0.5, 0.5], interpolation=interpolation, **given)
    kept, left = share_of(found, base, good, bad, "0.weight")
    assert abs(left) < 0.15 * kept
    assert score(found) > score(self_positioning(good, [bad], [0.5, 0.5], **{**given, "steps": 1}))


def test_self_positioning_moves_towards_the_ensemble() -> None:
    """The cross-entropy with the models' mean prediction falls, and a penalty makes λ, and so the delta, smaller."""
    model, x = network(), inputs()
    base = state(model)
    models = [changed(base, k) for k in (1, 2, 3)]
    outputs = [torch.func.functional_call(model, m, (x,)).softmax(-1) for m in models]
    target = sum(w * o for w, o in zip(MIXING, outputs))
    given: dict[str, Any] = {"base": base, "model": model, "data": [(x,)]}

    def loss(**options: Any) -> float:
        found = self_positioning(models[0], models[1:], MIXING, **given, **options)
        return float(cross_entropy(torch.func.functional_call(model, found, (x,)), target))

    assert loss(steps=0) > loss(steps=20) > loss(steps=80)

    def length(penalty: float) -> float:
        found = self_positioning(models[0], models[1:], MIXING, steps=40, penalty=penalty, **given)
        return sqrt(sum(float((found[n] - base[n]).square().sum()) for n in base))

    assert length(1.0) < length(0.0)


def test_self_positioning_starts_at_the_average_where_it_is_linear() -> None:
    """No steps, λ = 1, a = w: θ_base + Σ w τ."""
    model = network()
    base = state(model)
    own, peers = changed(base, 1), [changed(base, 2), changed(base, 3)]
    given: dict[str, Any] = {"base": base, "model": model, "data": [(inputs(),)], "steps": 0}
    found = self_positioning(own, peers, MIXING, interpolation="linear", **given)
    assert worst(found, task_arithmetic(own, peers, MIXING, base=base)) < 1e-12


def test_adamerging_plus_plus_takes_deltas_that_ties_would() -> None:
    """By hand on one tensor: trimmed at density 1/2 (5 and −3; 4 and 2), then what has not the elected sign goes."""
    model = nn.Linear(4, 1, bias=False)
    base = {"weight": torch.zeros(1, 4)}
    one, two = torch.tensor([[5.0, -3.0, 1.0, 0.5]]), torch.tensor([[0.5, 4.0, 2.0, 0.1]])
    found = adamerging(
        {"weight": one},
        [{"weight": two}],
        [0.5, 0.5],
        base=base,
        model=model,
        data=[(torch.ones(2, 4),)],
        density=0.5,
        steps=0,
    )
    torch.testing.assert_close(found["weight"], torch.tensor([[2.5, 2.0, 1.0, 0.0]]))


def small_resnet() -> tuple[nn.Module, Model, list[Model], Tensor]:
    model = randomise(ResNet(widths=(4, 6, 8)), 0)
    base = state(model)
    models = []
    for k in (1, 2):
        other = state(randomise(ResNet(widths=(4, 6, 8)), k))
        models.append({n: torch.lerp(t, other[n], 0.2) if t.is_floating_point() else t + k for n, t in base.items()})
    return model, base, models, torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", LEARNED)
def test_batchnorm_models_and_what_must_not_change(name: str) -> None:
    """Running statistics are averages by mixing weights, counters own's. Model (in training mode, with gradients off
    for one parameter), inputs, weights and the global random state are as before, under no_grad too."""
    model, base, (own, peer), x = small_resnet()
    model.train()
    model.conv1.weight.requires_grad_(False)
    handed = [state(model), {n: t.clone() for n, t in own.items()}, {n: t.clone() for n, t in peer.items()}]
    random = torch.random.get_rng_state()
    given: dict[str, Any] = {"base": base, "model": model, "data": [(x[:8],), (x[8:],)], "steps": 4, "lr": 0.05}
    first = COMBINE[name](own, [peer], [0.75, 0.25], **given)
    with torch.no_grad():
        second = COMBINE[name](own, [peer], [0.75, 0.25], **given)
    assert_same_bits(second, first)
    average = 0.75 * own["bn1.running_var"] + 0.25 * peer["bn1.running_var"]
    torch.testing.assert_close(first["bn1.running_var"], average)
    assert torch.equal(first["bn1.num_batches_tracked"], own["bn1.num_batches_tracked"])
    assert not torch.allclose(first["conv1.weight"], 0.75 * own["conv1.weight"] + 0.25 * peer["conv1.weight"])
    for weights, before in zip((model.state_dict(), own, peer), handed):
        assert_same_bits(weights, before)
    assert all(module.training for module in model.modules())
    assert not model.conv1.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(random, torch.random.get_rng_state())


class Tied(nn.Module):
    """Two names of one tensor, a parameter that is never used, and outputs as Hugging Face's models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 5, bias=False)
        self.head = nn.Linear(5, 5, bias=False)
        self.head.weight = self.embed.weight
        self.idle = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(torch.tanh(self.embed(x)))}


@pytest.mark.parametrize("name", LEARNED)
def test_tied_tensors_are_one_and_unused_ones_stay_at_their_start(name: str) -> None:
    """Both names come out as the same numbers; logits are found in what the model returns."""
    model = randomise(Tied(), 0)
    base = state(model)
    models: list[Model] = []
    for k in (1, 2):
        moved = changed({n: base[n] for n in ("embed.weight", "idle")}, k)
        models.append({**moved, "head.weight": moved["embed.weight"]})
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {"base": base, "model": model, "data": [(x,)], "steps": 10}
    found = COMBINE[name](models[0], models[1:], [0.5, 0.5], **given)
    assert torch.equal(found["embed.weight"], found["head.weight"])
    if name == "adamerging":
        expected = (models[0]["idle"] + models[1]["idle"]) / 2
        torch.testing.assert_close(found["idle"], expected)


@pytest.mark.parametrize("name", LEARNED)
def test_classes_may_lie_on_another_axis(name: str) -> None:
    """A network that gives (examples, classes, positions) learns what its transpose does."""

    class Turned(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mT

    plain = network()
    turned = Turned(*plain)
    base = state(plain)
    x = torch.randn(8, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own, peer = changed(base, 1), changed(base, 2)
    given: dict[str, Any] = {"base": base, "data": [(x,)], "steps": 5}
    one = COMBINE[name](own, [peer], [0.5, 0.5], model=plain, **given)
    other = COMBINE[name](own, [peer], [0.5, 0.5], model=turned, class_dim=1, **given)
    assert worst(other, one) < 1e-9
    with pytest.raises(MergeError, match=r"\[8, 4, 3\], which has no axis 3"):
        COMBINE[name](own, [peer], [0.5, 0.5], model=turned, class_dim=3, **given)


def test_descent_is_adam() -> None:
    """Reference: torch.optim.Adam on a bowl, in float64."""
    start = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    found = descend(start, lambda point, step: 2 * point + step, steps=30, lr=0.05)
    point = start.clone()
    adam = torch.optim.Adam([point], lr=0.05)
    for step in range(30):
        point.grad = 2 * point + step
        adam.step()
    torch.testing.assert_close(found, point, rtol=1e-12, atol=1e-12)
    assert float(descend(start, lambda point, _: -point, steps=90, lr=0.05, bounds=(-2.0, 1.0)).max()) == 1.0


def test_batches_are_taken_in_order_and_no_more_than_the_steps() -> None:
    """Cut to the batch size, empty ones passed over; data may be iterated once only for as long as they last."""
    data = [(torch.arange(5),), (torch.arange(0),), (torch.arange(5, 7),)]
    assert [b[0].tolist() for b in batches_of(data, 9, 2)] == [[0, 1], [2, 3], [4], [5, 6]]
    assert [b[0].tolist() for b in batches_of(data, 2, None)] == [[0, 1, 2, 3, 4], [5, 6]]


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": None}, r"merge\.base"),
        ({"model": None}, "learns its coefficients: pass the model"),
        ({"data": None}, "learns its coefficients: pass data"),
        ({"data": []}, "the data to merge with are empty"),
        ({"data": [(torch.full((2, 6), torch.nan),)]}, "loss on the data to merge with is nan"),
        ({"model": nn.Linear(6, 4)}, "'weight' of the model is missing from own weights"),
        ({"model": nn.Sequential(nn.Linear(6, 9))}, r"'0.weight' is \[10, 6\], in the model \[9, 6\]"),
    ],
)
def test_what_is_missing_is_one_clear_error(name: str, change: dict[str, Any], message: str) -> None:
    model = network()
    base = state(model)
    context = {"base": base, "model": model, "data": [(inputs(),)], "score": None, **change}
    with pytest.raises(MergeError, match=message):
        dict(combine_registry.call(name, {}, changed(base, 1), [changed(base, 2)], [0.5, 0.5], **context))


def test_a_score_that_is_missing_and_outputs_that_are_no_logits() -> None:
    """Named with what to do."""
    model = network()
    base = state(model)
    with pytest.raises(MergeError, match="needs score="):
        self_positioning(base, [base], [0.5, 0.5], base=base, model=model, objective="score")

    class Words(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return "no logits"

    with pytest.raises(MergeError, match="no logits to learn from, it is str"):
        adamerging(base, [base], [0.5, 0.5], base=base, model=Words(*model), data=[(inputs(),)])


@pytest.mark.parametrize(
    "merge",
    [
        {"combine": "adamerging", "repair": "batchnorm"},
        {"combine": "self-positioning", "align_data": "probe"},
        {"combine": {"name": "self-positioning", "options": {"objective": "score", "steps": 12}}},
    ],
)
def test_agents_merge_with_their_own_data_in_the_simulator(merge: Any, tmp_path: Path) -> None:
    """From a shared start, with the base named by its seed; the labelled score is taken on the probe set."""
    changes = {"method": "average", "base": {"seed": 0}, **merge}
    config = tiny_experiment(tmp_path, merge=changes, train__initialisation="shared")
    results = run_simulation(config)
    last = [row.after for row in results.rows if row.round == 3]
    assert len(last) == 3
    assert min(last) > 0.4  # of four classes
