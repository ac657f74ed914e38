"""LoRA-LEGO: planted clusters, the definition written out, invariances, and scikit-learn's k-means as a yardstick."""

from __future__ import annotations

from itertools import permutations
from itertools import product as choices

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dimat.merge.lora.factors import Factors
from dimat.merge.lora.lora_units import Units, clusters_of, units_of
from tests.merge.lora.test_lora import Model, adapter, product, relative
from tests.merge.methods import combine


def model_of(units: list[tuple[Tensor, Tensor]]) -> Model:
    return {
        "q.lora_A.weight": torch.stack([a for a, _ in units]),
        "q.lora_B.weight": torch.stack([b for _, b in units], 1),
    }


def lego(models: list[Model], weights: list[float], rank: int | None = None, scaling: float = 1.0) -> Model:
    options = {} if rank is None else {"rank": rank}
    return combine("lora-lego", models[0], models[1:], weights, scaling=scaling, **options)


def planted(seed: int, noise: float, count: int = 3, kinds: int = 4) -> tuple[list[Model], list[tuple[Tensor, Tensor]]]:
    """Models that have the same units but for noise, their order, their signs, and where their length lies."""
    g = torch.Generator().manual_seed(seed)

    def draw(size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    truth = [(draw(30), draw(20)) for _ in range(kinds)]
    models: list[Model] = []
    for _ in range(count):
        units = []
        for k in torch.randperm(kinds, generator=g).tolist():
            a, b = (vector + noise * draw(len(vector)) for vector in truth[k])
            factor = float(draw(1).exp()) * (1 if torch.rand((), generator=g) < 0.5 else -1)
            units.append((a * factor, b / factor))
        models.append(model_of(units))
    return models, truth


@pytest.mark.parametrize("seed", range(5))
def test_units_that_models_share_are_found(seed: int) -> None:
    """Four units in three models: in any order and sign, without noise the models' own product; with noise closer to
    what they share than any of them."""
    models, truth = planted(seed, 0.0)
    shared = product(model_of(truth))
    assert relative(product(lego(models, [0.5, 0.3, 0.2])), shared) < 1e-12
    assert relative(product(lego(models, [0.5, 0.3, 0.2], rank=12)), shared) < 1e-12
    noisy, truth = planted(seed, 0.3)
    shared = product(model_of(truth))
    found = relative(product(lego(noisy, [1 / 3] * 3)), shared)
    assert found < 0.85 * min(relative(product(model), shared) for model in noisy)


def written_out(models: list[Model], weights: list[float], groups: list[list[tuple[int, int, int]]]) -> Tensor:
    """The definition for given clusters of (model, rank, sign), with loops: centroids of balanced directions, back at
    the mean size."""
    total = torch.zeros_like(product(models[0]))
    for group in groups:
        centre, sizes, mass, share = 0, 0.0, 0.0, 0.0
        for k, i, sign in group:
            a, b = models[k]["q.lora_A.weight"][i], models[k]["q.lora_B.weight"][:, i]
            p = float(a.norm() * b.norm())
            centre = centre + sign * weights[k] * p * torch.cat([a / a.norm(), b / b.norm()]) / 2**0.5
            sizes, share = sizes + weights[k] * p**0.5, share + weights[k]
            mass += weights[k] * p
        centre = centre / mass
        unit = centre / centre.norm() * 2**0.5 * (sizes / share)
        columns = models[0]["q.lora_A.weight"].shape[1]
        total += torch.outer(unit[columns:], unit[:columns])
    return total * (models[0]["q.lora_A.weight"].shape[0] / len(groups)) ** 0.5


def best_clusters(models: list[Model], weights: list[float], count: int) -> list[list[tuple[int, int, int]]]:
    """Every way to put the units into clusters with every sign, and the one that costs least."""
    units = [(k, i) for k, m in enumerate(models) for i in range(len(m["q.lora_A.weight"]))]
    vectors, mass = [], []
    for k, i in units:
        a, b = models[k]["q.lora_A.weight"][i], models[k]["q.lora_B.weight"][:, i]
        vectors.append(torch.cat([a / a.norm(), b / b.norm()]) / 2**0.5)
        mass.append(weights[k] * float(a.norm() * b.norm()))
    best, found = float("inf"), []
    for labels in choices(range(count), repeat=len(units)):
        for signs in choices((1, -1), repeat=len(units)):
            if any(sign < 0 for label, sign in dict(zip(reversed(labels), reversed(signs))).items()):
                continue  # a cluster's first unit has a +
            cost = 0.0
            for j in {*labels}:
                held = [n for n, label in enumerate(labels) if label == j]
                total = sum((signs[n] * mass[n] * vectors[n] for n in held), torch.zeros_like(vectors[0]))
                weight = sum(mass[n] for n in held)
                cost += weight - float(total.square().sum()) / weight
            if cost < best - 1e-12:
                best = cost
                found = [[(*units[n], signs[n]) for n, label in enumerate(labels) if label == j] for j in {*labels}]
    return found


@pytest.mark.parametrize("seed", range(4))
def test_the_definition(seed: int) -> None:
    """Reference: the cheapest of all clusterings and signs, and the formula with loops; models near each other."""
    first = adapter(seed, 2, 5, 6)
    models = [first] + [
        {n: t + 0.4 * d for (n, t), d in zip(first.items(), adapter(seed + 10 * k, 2, 5, 6).values())} for k in (1, 2)
    ]
    weights = [0.5, 0.3, 0.2]
    for rank in (1, 2):
        expected = written_out(models, weights, best_clusters(models, weights, rank))
        assert relative(product(lego(models, weights, rank)), expected) < 1e-9
    assert relative(product(lego(models, weights, scaling=0.5)), 0.5 * product(lego(models, weights))) < 1e-12


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**20), data=st.data())
def test_property_order_sign_and_length_of_ranks_do_not_matter(seed: int, data: st.DataObject) -> None:
    """Any model's ranks permuted, flipped (a, b → −a, −b), and with factors moved between a and b."""
    models = [adapter(seed + k) for k in range(3)]
    changed = []
    for model in models:
        a, b = model.values()
        order = data.draw(st.permutations(range(4)))
        factor = torch.tensor([data.draw(st.sampled_from([1.0, -1.0, 2.0, -0.125])) for _ in range(4)]).double()
        changed.append(dict(zip(model, ((a * factor[:, None])[order], (b / factor)[:, order]))))
    expected = product(lego(models, [0.5, 0.3, 0.2]))
    assert relative(product(lego(changed, [0.5, 0.3, 0.2])), expected) < 1e-9


def test_what_it_is_not_invariant_to() -> None:
    """As its docstring says: another basis of the same product has other units."""
    models = [adapter(k) for k in range(2)]
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    a, b = models[1].values()
    turned = dict(zip(models[1], (turn.mT @ a, b @ turn)))
    assert relative(product(turned), product(models[1])) < 1e-12
    assert relative(product(lego([models[0], turned], [0.5, 0.5])), product(lego(models, [0.5, 0.5]))) > 0.01


def drawn(seed: int, count: int, spread: float) -> Units:
    """Units about five centres, all with entries of one sign, so that k-means without signs is the same problem."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.rand(5, 24, generator=g, dtype=torch.float64)
    vectors = centres[torch.arange(count) % 5] + spread * torch.rand(count, 24, generator=g, dtype=torch.float64)
    part = Factors(vectors[:, :14], vectors[:, 14:].mT * torch.rand(count, generator=g, dtype=torch.float64).add(0.5))
    return units_of([part], [1.0])


def inertia(units: Units, clusters: Tensor) -> float:
    vectors = torch.cat([units.a, units.b], 1) / 2**0.5
    mass = units.weights * units.strengths
    mass = mass / mass.max()
    total = clusters.mT @ vectors
    return float(mass.sum() - (total.square().sum(1) / clusters.abs().sum(0)).sum())


@pytest.mark.parametrize(("seed", "spread"), [(0, 0.3), (1, 0.3), (2, 0.8), (3, 0.8), (4, 2.0)])
def test_clusters_are_as_good_as_those_of_many_random_starts(seed: int, spread: float) -> None:
    """Reference: scikit-learn's weighted k-means, best of 50 starts; ours draws nothing and comes within 3 %."""
    from sklearn.cluster import KMeans  # takes three seconds: not in each process that collects tests

    units = drawn(seed, 60, spread)
    clusters = clusters_of(units, 5)
    assert clusters.shape == (60, 5)
    vectors = torch.cat([units.a, units.b], 1) / 2**0.5
    mass = (units.weights * units.strengths).numpy()
    best = KMeans(5, n_init=50, random_state=0).fit(vectors.numpy(), sample_weight=mass / mass.max()).inertia_
    assert inertia(units, clusters) <= 1.03 * best


@pytest.mark.parametrize("seed", range(3))
def test_every_unit_is_nearest_to_its_own_centroid(seed: int) -> None:
    """What k-means ends in; signs too."""
    units = units_of([Factors(*adapter(seed + k, 8).values()) for k in range(4)], [0.4, 0.3, 0.2, 0.1])
    clusters = clusters_of(units, 8)
    assert ((clusters != 0).sum(1) == 1).all()
    vectors = torch.cat([units.a, units.b], 1) / 2**0.5
    centroids = (clusters / clusters.abs().sum(0)).mT @ vectors
    distance = torch.stack([torch.cdist(vectors, centroids), torch.cdist(vectors, -centroids)])
    present = clusters.abs().argmax(1)
    chosen = distance[(clusters.sum(1) < 0).long(), torch.arange(len(vectors)), present]
    assert (chosen <= distance.amin((0, 2)) + 1e-9).all()


def test_nothing_is_drawn_and_models_in_any_order_give_the_same() -> None:
    """Twice the same bits; torch's generator is not touched; six orders agree."""
    models, weights = [adapter(k, 6, 15, 12) for k in range(4)], [0.4, 0.3, 0.2, 0.1]
    state = torch.random.get_rng_state()
    first, again = lego(models, weights), lego(models, weights)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(torch.random.get_rng_state(), state)
    for order in permutations(range(1, 4)):
        moved = lego([models[0], *(models[k] for k in order)], [0.4, *(weights[k] for k in order)])
        assert relative(product(moved), product(first)) < 1e-9


def test_sizes() -> None:
    """Units of equal length and clusters of one each: full strength times √(r/n); ranks beyond the units are zero."""
    eye = torch.eye(8, dtype=torch.float64)
    models = [model_of([(eye[k], eye[k]), (eye[k + 1], eye[k + 1])]) for k in (0, 2, 4)]
    found = product(lego(models, [1 / 3] * 3, rank=6))
    expected = torch.zeros(8, 8, dtype=torch.float64)
    expected[:6, :6] = torch.eye(6, dtype=torch.float64) * (2 / 6) ** 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    one = lego([models[0], model_of([(eye[0], eye[0]), (eye[1], 0 * eye[1])])], [0.5, 0.5], rank=4)
    assert int((one["q.lora_B.weight"].abs().amax(0) > 0).sum()) == 2
    assert one["q.lora_A.weight"].shape == (4, 8)
    nothing = model_of([(eye[0], 0 * eye[0])])
    assert not lego([nothing, nothing], [0.5, 0.5], rank=2)["q.lora_B.weight"].any()
    opposed = lego([model_of([(eye[0], eye[1])]), model_of([(eye[0], -eye[1])])], [0.5, 0.5])
    assert product(opposed).abs().max() < 1e-12
