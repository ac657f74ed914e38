"""Robust combination: attackers on a problem whose answer is known, exactness, and each method's formula."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dimat.config import MergeConfig
from dimat.errors import ConfigError, MergeError
from dimat.merge import MergeContext, Peer, merge, plan_merge
from dimat.merge.tensors.distances import distances_from, inner_products, squared_distances
from tests.merge.methods import Counted, assert_same_bits, combine, state, worst

ROBUST = ["coordinate-median", "trimmed-mean", "geometric-median", "krum", "clipped-gossip"]
TWO_PASSES = ROBUST[2:]
SIZE = 400
Models = list[dict[str, Tensor]]


def flat(model: dict[str, Tensor]) -> Tensor:
    return torch.cat([model["a"].flatten(), model["b"].flatten()]).double()


def model(values: Tensor) -> dict[str, Tensor]:
    """A model of two tensors, so that norms of single tensors are not those of the model."""
    return {"a": values[: SIZE // 4].reshape(10, -1).clone(), "b": values[SIZE // 4 :].clone()}


def quadratic(honest: int, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Minimisers of ½‖θ − c_k‖², c_k = c + noise: agents' models after training, and the c they all estimate."""
    g = torch.Generator().manual_seed(seed)
    centre = 5 * torch.randn(SIZE, generator=g)
    return centre, [centre + torch.randn(SIZE, generator=g) for _ in range(honest)]


def sign_flip(honest: Tensor, count: int, g: torch.Generator) -> Tensor:
    return -honest.mean(0).expand(count, -1)


def scaled(honest: Tensor, count: int, g: torch.Generator) -> Tensor:
    return 100 * honest[:count]


def random(honest: Tensor, count: int, g: torch.Generator) -> Tensor:
    return 30 * torch.randn(count, SIZE, generator=g)


def alie(honest: Tensor, count: int, g: torch.Generator) -> Tensor:
    """A little is enough (Baruch et al. 2019, arXiv 1902.06156): all at one deviation from the honest mean."""
    return (honest.mean(0) - honest.std(0)).expand(count, -1)


CASES = [(5, 1), (10, 3)]


def attacked(n: int, f: int, attack: Callable[..., Tensor], seed: int) -> tuple[Tensor, float, Models, Models]:
    """Return the truth, the honest spread (largest distance of an honest model from the truth), and both sides."""
    truth, honest = quadratic(n - f, seed)
    evil = attack(torch.stack(honest), f, torch.Generator().manual_seed(seed + 1))
    spread = max(float((h - truth).norm()) for h in honest)
    return truth.double(), spread, [model(h) for h in honest], [model(e) for e in evil]


@pytest.mark.parametrize("attack", [sign_flip, scaled, random, alie])
@pytest.mark.parametrize(("n", "f"), CASES)
@pytest.mark.parametrize("method", ROBUST)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_attackers_within_the_breakdown_point(
    method: str, n: int, f: int, attack: Callable[..., Tensor], seed: int
) -> None:
    """Equal weights, default options: each method stays within the honest spread; the average is carried away.

    ALIE hides inside the spread, so it moves the average little, and it was made to be what Krum chooses: the
    attackers stand together. Krum then errs by their distance from the truth, a little over the spread.
    """
    truth, spread, honest, evil = attacked(n, f, attack, seed)
    models = [*honest, *evil]
    errors = {
        name: float((flat(combine(name, models[0], models[1:], [1 / n] * n)) - truth).norm())
        for name in (method, "average")
    }
    assert errors[method] <= (1.25 * spread if (method, attack) == ("krum", alie) else spread)
    if attack is not alie:
        assert errors["average"] > 1.5 * spread


@pytest.mark.parametrize("method", ["coordinate-median", "trimmed-mean", "geometric-median"])
def test_beyond_the_breakdown_point_they_break(method: str) -> None:
    """6 of 10 colluders carry every method away: the bounds above can fail."""
    truth, spread, honest, evil = attacked(10, 6, sign_flip, 0)
    models = [*honest, *evil]
    assert float((flat(combine(method, models[0], models[1:], [0.1] * 10)) - truth).norm()) > 2 * spread


def test_weight_counts_rather_than_heads() -> None:
    """Three attackers of weight 0.1 against one honest peer of 0.3 and own's 0.4; Krum counts heads."""
    truth, spread, honest, evil = attacked(5, 3, sign_flip, 0)
    models, weights = [*honest, *evil], [0.4, 0.3, 0.1, 0.1, 0.1]
    for method in ("coordinate-median", "trimmed-mean", "geometric-median"):
        assert float((flat(combine(method, models[0], models[1:], weights)) - truth).norm()) <= spread
    assert float((flat(combine("krum", models[0], models[1:], weights)) - truth).norm()) > spread


def test_in_the_pipeline_after_the_screen() -> None:
    """A sign-flipped peer passes the screen, which judges norms, and not the median; options come from the config."""
    truth, spread, honest, evil = attacked(5, 1, sign_flip, 0)
    peers = [Peer(f"p{k}", w, 0.2) for k, w in enumerate([*honest[1:], *evil])]
    plans: list[dict[str, Any]] = [{"name": name, "options": {}} for name in ROBUST]
    plans += [{"name": "trimmed-mean", "options": {"share": 0.25}}, {"name": "krum", "options": {"f": 1, "m": 2}}]
    for table in plans:
        plan = plan_merge(MergeConfig.model_validate({"method": "average", "combine": table}))
        outcome = merge(honest[0], 0.2, peers, plan, MergeContext())
        assert not outcome.refused
        assert float((flat(outcome.weights) - truth).norm()) <= spread


# exactness, for every method


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ROBUST)
def test_exact_where_there_is_nothing_to_merge(method: str, dtype: torch.dtype) -> None:
    """Weight 1 on self, no peers, and equal models give own bit for bit, in own memory."""
    own, other = state(0, dtype), state(1, dtype)
    copy = {name: tensor.clone() for name, tensor in own.items()}
    assert_same_bits(combine(method, own, [other, other], [1.0, 0.0, 0.0]), own)
    assert_same_bits(combine(method, own, [], [1.0]), own)
    for weights in ([0.5, 0.5], [1 / 3] * 3, [0.1, 0.2, 0.7], [0.0, 1.0], [0.2] * 5):
        merged = combine(method, own, [copy] * (len(weights) - 1), weights)
        assert_same_bits(merged, own)
        assert all(merged[n].data_ptr() != own[n].data_ptr() for n in own if own[n].numel())


@pytest.mark.parametrize("method", ROBUST)
def test_weight_one_on_a_peer_returns_the_peer(method: str) -> None:
    """… whatever own holds, but for clipping, which a peer's weight does not overrule; integers are own's."""
    own, peer = state(0), state(1)
    options = {"radius": 1e9} if method == "clipped-gossip" else {}
    merged = combine(method, own, [peer, state(2)], [0.0, 1.0, 0.0], **options)
    assert worst(merged, peer) < 1e-6
    for name in ("count", "mask"):
        assert torch.equal(merged[name], own[name])


@pytest.mark.parametrize("weights", [[0.25] * 4, [0.4, 0.3, 0.2, 0.1], [0.5, 0.25, 0.25, 0.0]])
@pytest.mark.parametrize("method", ROBUST)
def test_the_order_of_peers_does_not_matter(method: str, weights: list[float]) -> None:
    """Reference: all orders of three peers."""
    own, peers = state(0), [state(k) for k in (1, 2, 3)]
    merged = combine(method, own, peers, weights)
    for order in permutations(range(3)):
        again = combine(method, own, [peers[k] for k in order], [weights[0], *(weights[k + 1] for k in order)])
        assert worst(again, merged) < 1e-6


@pytest.mark.parametrize("method", ROBUST)
def test_inputs_stay_and_results_have_their_shapes(method: str) -> None:
    """Nothing that is handed in changes; half types keep their type and come near the float64 result."""
    states = [state(k) for k in range(5)]
    copies = [{n: t.clone() for n, t in s.items()} for s in states]
    merged = combine(method, states[0], states[1:], [0.2] * 5)
    for before, after in zip(copies, states):
        assert_same_bits(after, before)
    halves = [{n: t.bfloat16() if t.is_floating_point() else t for n, t in s.items()} for s in states]
    low = combine(method, halves[0], halves[1:], [0.2] * 5)
    assert all(low[n].dtype == halves[0][n].dtype for n in low)
    assert worst(low, merged) < 0.02


@pytest.mark.parametrize("method", TWO_PASSES)
def test_peers_are_read_tensor_by_tensor_twice(method: str) -> None:
    """Once for distances, once for the sum if they are in it: one tensor of each is in memory at a time."""
    own, peers = state(0), [Counted(state(k)) for k in (1, 2)]
    combine(method, own, peers, [0.4, 0.3, 0.3])
    names = [n for n, t in own.items() if t.is_floating_point()]
    filled = [n for n in names if own[n].numel()]
    chosen = 1 if method == "krum" else 2
    assert sorted(peer.reads == names + filled for peer in peers) == [False] * (2 - chosen) + [True] * chosen
    assert all(peer.reads in (names, names + filled) for peer in peers)


@pytest.mark.parametrize("method", TWO_PASSES)
def test_values_that_are_not_finite_are_named(method: str) -> None:
    """The pipeline's screen refuses them before; called alone, distances do."""
    own, peer = state(0), state(1)
    peer["linear"][2, 2] = float("nan")
    with pytest.raises(MergeError, match=r"'linear' of peer 1 .*not finite"):
        combine(method, own, [state(2), peer], [0.4, 0.3, 0.3])
    with pytest.raises(MergeError, match="'linear' of own weights"):
        combine(method, peer, [own, own], [0.4, 0.3, 0.3])


# formulas


@settings(max_examples=40, deadline=None)
@given(raw=st.lists(st.integers(0, 4), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_weighted_median_is_that_of_repeated_values(raw: list[int], seed: int) -> None:
    """Reference: the plain median of a list in which model k stands w_k · total times."""
    counts = [1, *raw]
    values = torch.randn(len(counts), 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    merged = combine(
        "coordinate-median",
        {"x": values[0]},
        [{"x": v} for v in values[1:]],
        [c / sum(counts) for c in counts],
    )
    ordered = values.repeat_interleave(torch.tensor(counts), 0).sort(0).values
    expected = (ordered[(sum(counts) - 1) // 2] + ordered[sum(counts) // 2]) / 2
    torch.testing.assert_close(merged["x"], expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(raw=st.lists(st.integers(0, 4), min_size=1, max_size=5), cut=st.integers(0, 10), seed=st.integers(0, 99))
def test_trimmed_mean_is_that_of_repeated_values(raw: list[int], cut: int, seed: int) -> None:
    """Reference: repeated values without the `cut` largest and smallest."""
    counts = [1, *raw]
    total = sum(counts)
    cut = min(cut, (total - 1) // 2)
    values = torch.randn(len(counts), 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = [c / total for c in counts]
    merged = combine("trimmed-mean", {"x": values[0]}, [{"x": v} for v in values[1:]], weights, share=cut / total)
    ordered = values.repeat_interleave(torch.tensor(counts), 0).sort(0).values
    torch.testing.assert_close(merged["x"], ordered[cut : total - cut].mean(0), rtol=1e-9, atol=1e-9)


def test_large_tensors_are_sorted_in_blocks() -> None:
    """A tensor over the block's size gives what torch's median gives."""
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(300_001, generator=g) for _ in range(3)]
    merged = combine("coordinate-median", {"x": values[0]}, [{"x": v} for v in values[1:]], [1 / 3] * 3)
    assert torch.equal(merged["x"], torch.stack(values).median(0).values)


def test_distances_over_whole_models() -> None:
    """Reference: flattened models; a mix's distances from inner products alone."""
    states = [state(k) for k in range(4)]
    whole = torch.stack(
        [torch.cat([t.double().flatten() for t in s.values() if t.is_floating_point()]) for s in states]
    )
    products = inner_products(states[0], states[1:])
    torch.testing.assert_close(squared_distances(products).sqrt(), torch.cdist(whole, whole), rtol=1e-9, atol=1e-9)
    mix = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    expected = (whole - mix @ whole).norm(dim=1)
    torch.testing.assert_close(distances_from(mix, products), expected, rtol=1e-9, atol=1e-9)


def test_geometric_median_minimises_the_sum_of_distances() -> None:
    """Reference: at the optimum the weighted unit vectors towards the models cancel; the cost cannot be lowered."""
    states, weights = [model(v) for v in quadratic(5, 0)[1]], [0.3, 0.25, 0.2, 0.15, 0.1]
    states = [{n: t.double() for n, t in s.items()} for s in states]
    found = flat(combine("geometric-median", states[0], states[1:], weights))
    gaps = torch.stack([flat(s) - found for s in states])
    pull = (torch.tensor(weights, dtype=torch.float64)[:, None] * gaps / gaps.norm(dim=1, keepdim=True)).sum(0)
    assert float(pull.norm()) < 1e-8
    assert float((flat(combine("average", states[0], states[1:], weights)) - found).norm()) > 1e-3


def test_geometric_median_of_a_model_with_most_weight_is_that_model() -> None:
    """A vertex of weight over 1/2 is the minimiser; smoothing keeps the division finite there."""
    states = [state(k) for k in range(3)]
    merged = combine("geometric-median", states[0], states[1:], [0.6, 0.2, 0.2])
    assert worst(merged, states[0]) < 1e-5


def test_krum_returns_the_model_with_the_nearest_neighbours() -> None:
    """Reference: scores by hand in one dimension. n = 6, f = 1: three nearest."""
    points = [0.0, 1.0, 2.5, 3.1, 4.2, 50.0]
    gaps = [sorted((p - q) ** 2 for q in points)[1:4] for p in points]
    order = sorted(range(6), key=lambda k: sum(gaps[k]))
    states = [{"x": torch.tensor([p])} for p in points]
    assert combine("krum", states[0], states[1:], [1 / 6] * 6, f=1)["x"].item() == pytest.approx(points[order[0]])
    for m, used in ((2, 2), (3, 3), (9, 3)):
        merged = combine("krum", states[0], states[1:], [0.5, 0.1, 0.1, 0.1, 0.1, 0.1], f=1, m=m)
        assert merged["x"].item() == pytest.approx(sum(points[k] for k in order[:used]) / used)


def test_krum_leaves_out_models_of_weight_zero_and_says_when_there_are_too_few() -> None:
    """n counts who takes part; f left out adapts to n, and ties choose all that tie."""
    states = [{"x": torch.tensor([p])} for p in (0.0, 1.0, 1.5, 2.5, 3.5)]
    with pytest.raises(MergeError, match="at least 5 models, got 4"):
        combine("krum", states[0], states[1:], [0.25, 0.25, 0.25, 0.25, 0.0], f=1)
    assert combine("krum", states[0], states[1:], [0.0, 0.5, 0.0, 0.5, 0.0])["x"].item() == pytest.approx(1.75)
    assert combine("krum", states[0], states[1:4], [0.4, 0.2, 0.2, 0.2])["x"].item() == pytest.approx(1.25)


def test_clipping_is_the_paper_s_formula() -> None:
    """Reference: clip(z, τ) = z · min(1, τ/‖z‖) on flattened models; a far peer moves own by w τ."""
    states = [model(v) for v in quadratic(4, 0)[1]]
    states[3] = model(1000 * flat(states[3]).float())
    weights, radius = [0.4, 0.3, 0.2, 0.1], 20.0
    own = flat(states[0])
    expected = own.clone()
    for weight, peer in zip(weights[1:], states[1:]):
        gap = flat(peer) - own
        expected += weight * gap * min(1.0, radius / float(gap.norm()))
    found = flat(combine("clipped-gossip", states[0], states[1:], weights, radius=radius))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    wide = combine("clipped-gossip", states[0], states[1:], weights, radius=1e9)
    assert worst(wide, combine("average", states[0], states[1:], weights)) < 1e-6
    moves = [
        float((flat(combine("clipped-gossip", states[0], states[1:], weights, radius=r)) - own).norm())
        for r in (0.1, 1.0, 10.0, 30.0)
    ]
    assert all(a < b for a, b in pairwise(moves))


def test_adaptive_radius() -> None:
    """Reference: τ² = Σ_H w d²/δ by hand; H = own and the nearest peers up to 1 − δ, so the far one has no say."""
    states = [{"x": torch.tensor([p])} for p in (0.0, 1.0, 2.0, 1e4)]
    merged = combine("clipped-gossip", states[0], states[1:], [0.4, 0.2, 0.2, 0.2], byzantine=0.2)
    radius = ((0.2 * 1 + 0.2 * 4) / 0.2) ** 0.5
    assert merged["x"].item() == pytest.approx(0.2 * 1 + 0.2 * 2 + 0.2 * radius)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("trimmed-mean", {"share": 0.5}),
        ("trimmed-mean", {"share": -0.1}),
        ("krum", {"f": -1}),
        ("krum", {"m": 0}),
        ("clipped-gossip", {"radius": 0.0}),
        ("clipped-gossip", {"byzantine": 1.0}),
        ("geometric-median", {"smoothing": 0}),
        ("geometric-median", {"iterations": 0}),
        ("coordinate-median", {"share": 0.1}),
    ],
)
def test_options_out_of_range_are_refused(method: str, options: dict[str, Any]) -> None:
    """A configuration error names the option before anything is merged."""
    with pytest.raises(ConfigError, match=next(iter(options))):
        combine(method, state(0), [state(1)], [0.5, 0.5], **options)
