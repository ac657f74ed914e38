"""What stays of a delta: thresholds within tensors and over whole models, breadcrumbs, SCE, DARE, DELLA.

References: torch.sort, formulas by hand, moments of the random drops, and mergekit's outputs on a tiny Llama
(`tests/golden/mergekit.safetensors`, float32: the tolerance is its last bits, 2e-7). mergekit's own DARE and DELLA draw
from a global stream in tensor order, which no other program can repeat: their moments are tested.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dimat.errors import ConfigError, MergeError
from dimat.merge.combine.breadcrumbs import breadcrumbs, ends
from dimat.merge.combine.dare import dare_linear, dare_ties
from dimat.merge.combine.della import della, keep_probability
from dimat.merge.combine.sce import sce
from dimat.merge.combine.task_arithmetic import task_arithmetic
from dimat.merge.combine.ties import ties
from dimat.merge.tensors.pieces import SAMPLE, Pieces
from dimat.merge.tensors.sparsify import draws, magnitudes, order_statistics, ranked_among, smallest_kept, trimmed
from tests.merge.combine.test_task_vectors import (
    MERGEKIT_WEIGHTS,
    THIRDS,
    assert_golden,
    delta_of,
    llama,
    mlp,
    part,
    toy,
)


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    seed=st.integers(0, 999),
    kind=st.sampled_from(["normal", "tiny", "huge", "ties", "zeros"]),
)
def test_order_statistics_equal_sorting(sizes: list[int], seed: int, kind: str) -> None:
    """Reference: torch.sort of all elements of a model at once; every rank, bit for bit, for two models."""
    g = torch.Generator().manual_seed(seed)
    factor = {"normal": 1.0, "tiny": 1e-42, "huge": 1e37, "ties": 1.0, "zeros": 0.0}[kind]
    tensors = [torch.randn(size, generator=g) * factor for size in sizes]
    if kind == "ties":
        tensors = [(tensor * 2).round() for tensor in tensors]
    pairs = [[tensor, -2 * tensor] for tensor in tensors]
    total = sum(sizes)
    if not total:
        return
    found = order_statistics(lambda: pairs, lambda d: range(d))
    for model, values in enumerate(found):
        expected = torch.cat([pair[model].flatten() for pair in pairs]).sort().values
        assert torch.equal(torch.tensor(values), expected)


def test_order_statistics_of_nothing_is_an_error() -> None:
    """A model without floating-point tensors."""
    with pytest.raises(MergeError, match="nothing to rank"):
        order_statistics(lambda: [], lambda d: [0])


@settings(max_examples=60)
@given(n=st.integers(1, 50), density=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_the_largest_are_kept(n: int, density: float, seed: int) -> None:
    """⌊density n⌋ elements, at least one; the smallest kept is no smaller than the largest dropped."""
    delta = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    [least] = smallest_kept(Pieces([delta], delta), [density])
    kept = trimmed(delta.clone(), least)
    mask = kept != 0
    assert int(mask.sum()) == max(1, int(density * n))
    assert torch.equal(kept[mask], delta[mask])
    if (~mask).any():
        assert delta[mask].abs().min() >= delta[~mask].abs().max()


def test_equal_magnitudes_stay_together() -> None:
    """So that nothing depends on the order of units."""
    for delta, kept in ((torch.tensor([1.0, -1.0, 1.0, 0.5]), [1.0, -1.0, 1.0, 0.0]), (torch.zeros(4), [0.0] * 4)):
        [least] = smallest_kept(Pieces([delta], delta), [0.25])
        assert trimmed(delta, least).tolist() == kept


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(70_000, 200_000),
    share=st.floats(0, 1),
    kind=st.sampled_from(["normal", "rounded", "few", "sorted", "striped"]),
    seed=st.integers(0, 99),
)
def test_ranks_among_many_values_are_exact(n: int, share: float, kind: str, seed: int) -> None:
    """Reference: sorting everything. Whatever a sample says: many equal values, order, values that it never shows."""
    values = torch.randn(n, generator=generator(seed)).abs()
    if kind == "rounded":
        values = values.bfloat16().float()
    elif kind == "few":
        values = values.round()
    elif kind == "sorted":
        values = values.sort().values
    elif kind == "striped":
        values[:: n // SAMPLE] += 10
    rank = min(n - 1, int(share * n))
    pieces = Pieces([values], values)
    got = ranked_among(lambda: map(magnitudes, pieces.of(0)), magnitudes(pieces.sample()[0]), n, rank)
    assert got == float(values.sort().values[rank])


def test_whole_vector_trim_keeps_small_tensors_small() -> None:
    """Over the whole model a tensor of small changes goes, per tensor each keeps its share."""
    base = {"large": torch.zeros(10), "small": torch.zeros(10)}
    own = {"large": torch.arange(1.0, 11.0), "small": torch.arange(1.0, 11.0) / 100}
    kept = {
        trim: ties(own, [own], [0.5, 0.5], base=base, density=0.4, trim=trim)  # type: ignore[arg-type]
        for trim in ("tensor", "vector")
    }
    assert {name: int((t != 0).sum()) for name, t in kept["tensor"].items()} == {"large": 4, "small": 4}
    # 20 elements, ⌊0.4 · 20⌋ = 8 and the threshold itself, as the authors' program has it
    assert {name: int((t != 0).sum()) for name, t in kept["vector"].items()} == {"large": 9, "small": 0}


def test_breadcrumbs_golden() -> None:
    """mergekit `breadcrumbs`, density 0.7, gamma 0.05."""
    base, models = llama()
    got = breadcrumbs(models[0], models[1:], THIRDS, base=base, weights=MERGEKIT_WEIGHTS, density=0.7, gamma=0.05)
    assert_golden(got, part("mergekit", "breadcrumbs"))


@pytest.mark.parametrize(
    ("density", "gamma", "expected"),
    [
        (0.5, 0.2, [0, 0, 0, 4, 5, 6, 7, 8, 0, 0]),
        (0.5, 0.0, [0, 0, 0, 0, 0, 6, 7, 8, 9, 10]),
        (0.5, 0.05, [0, 0, 0, 0, 0, 6, 7, 8, 9, 10]),  # ⌊0.05 · 10⌋ = 0 cuts nothing off
        (0.9, 0.3, [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]),  # both do not fit: fewer of the largest go
        (1.0, 0.3, list(range(1, 11))),
        (0.01, 0.0, [0] * 9 + [10]),  # at least one stays
        (0.01, 0.99, [1] + [0] * 9),
    ],
)
def test_breadcrumbs_cut_by_hand(density: float, gamma: float, expected: list[int]) -> None:
    """Magnitudes 1 to 10."""

    def cut(delta: Tensor) -> Tensor:
        [bounds] = ends(Pieces([delta], delta), [density], gamma)
        return trimmed(delta.clone(), *bounds)

    assert cut(torch.arange(1.0, 11.0)).tolist() == expected
    assert cut(-torch.arange(1.0, 11.0)).neg().tolist() == expected
    assert cut(torch.tensor(3.0)).item() == 3.0


def test_breadcrumbs_with_signs_is_ties_without_outliers() -> None:
    """gamma 0 trims as TIES does per tensor."""
    base, models = mlp()
    weights = [0.1, 0.2, 0.3, 0.4]
    for normalize, how in ((True, "mean"), (False, "sum")):
        got = breadcrumbs(
            models[0], models[1:], weights, base=base, density=0.3, gamma=0.0, elect_signs=True, normalize=normalize
        )
        expected = ties(models[0], models[1:], weights, base=base, density=0.3, merge_func=how)  # type: ignore[arg-type]
        assert_golden(got, expected, 0)
    halved = breadcrumbs(models[0], models[1:], weights, base=base, weights=[2.0] * 4, normalize=True)
    assert_golden(halved, breadcrumbs(models[0], models[1:], [0.25] * 4, base=base))


def test_sce_golden() -> None:
    """mergekit `sce`, select_topk 1: energies as coefficients, minority signs erased."""
    base, models = llama()
    assert_golden(sce(models[0], models[1:], THIRDS, base=base), part("mergekit", "sce_topk1"))


def test_sce_by_hand() -> None:
    """Selection by variance, then coefficients of what was selected: 2 of 4 elements, energies 5/4 and 10/4."""
    base, (own, peer) = toy([2.0, 1.0, 1.0, -1.0], [-1.0, 1.0, 1.0, 3.0])
    got = sce(own, [peer], [0.5, 0.5], base=base, select_topk=0.5)  # variances 2.25, 0, 0, 4
    assert delta_of(got) == [2.0, 0.0, 0.0, 3.0]
    base, (own, peer) = toy([1.0, 0.0], [3.0, 1.0])  # energies 1/2 and 10/2
    assert delta_of(sce(own, [peer], [0.5, 0.5], base=base)) == [round(31 / 11, 9), 1.0]
    assert delta_of(sce(own, [peer], [0.75, 0.25], base=base)) == [round(33 / 13, 9), 1.0]


def wide(*values: float, n: int = 40_000) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Return a zero base and models of large tensors, each of one constant plus a little noise."""
    g = torch.Generator().manual_seed(0)
    models = [{"w": v + torch.randn(200, n // 200, generator=g) * 1e-3} for v in values]
    return {"w": torch.zeros(200, n // 200)}, models


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_moments(density: float) -> None:
    """Reference: a Bernoulli mask, E = task arithmetic, share kept = density; 5 standard errors of 40,000 draws."""
    base, (own, peer) = wide(1.0, 3.0)
    error = 5 * (density * (1 - density) / 40_000) ** 0.5
    alone = dare_linear(own, [], [1.0], base=base, generator=generator(), density=density, weights=[1.0])["w"]
    assert float((alone != 0).double().mean()) == pytest.approx(density, abs=error)
    assert torch.allclose(alone[alone != 0], own["w"][alone != 0] / density)
    both = dare_linear(own, [peer], [0.5, 0.5], base=base, generator=generator(), density=density)["w"]
    assert float(both.mean()) == pytest.approx(2.0, abs=4 * error / density)
    raw = dare_linear(own, [peer], [0.5, 0.5], base=base, generator=generator(), density=density, rescale=False)["w"]
    assert torch.allclose(raw, both * density, atol=1e-6)
    # masks of different deltas are independent
    kept = [float((raw - v).abs().lt(0.01).double().mean()) for v in (2.0, 0.5, 1.5, 0.0)]
    expected = [density**2, density * (1 - density), density * (1 - density), (1 - density) ** 2]
    assert kept == pytest.approx(expected, abs=0.015)


def test_dare_at_density_one_is_task_arithmetic_and_ties() -> None:
    """Nothing is dropped."""
    base, models = mlp()
    weights = [0.1, 0.2, 0.3, 0.4]
    options: dict[str, Any] = {"base": base, "generator": generator(), "density": 1.0}
    linear = dare_linear(models[0], models[1:], weights, **options)
    assert_golden(linear, task_arithmetic(models[0], models[1:], weights, base=base), 0)
    for normalize, how in ((False, "sum"), (True, "mean")):
        elected = dare_ties(models[0], models[1:], weights, normalize=normalize, **options)
        expected = ties(models[0], models[1:], weights, base=base, density=1.0, merge_func=how)  # type: ignore[arg-type]
        assert_golden(elected, expected, 0)


def test_draws_depend_on_content_and_name_alone() -> None:
    """Equal deltas are dropped alike wherever they stand; another name, root or content draws anew."""

    def draw(delta: Tensor, root: int, name: str, size: int = 1 << 15) -> Tensor:
        [first, second] = draws(Pieces([delta, delta.mT.contiguous().mT], delta, size=size), root, name)
        numbers = torch.cat([*first])
        assert torch.equal(numbers, torch.cat([*second]))
        return numbers

    delta = torch.randn(50, 50, generator=generator())
    drawn = draw(delta, 1, "a")
    assert torch.equal(drawn, draw(delta.clone(), 1, "a"))
    assert 0.45 < drawn.mean() < 0.55
    for other in (draw(delta, 1, "b"), draw(delta, 2, "a"), draw(delta + 1, 1, "a")):
        assert torch.corrcoef(torch.stack([drawn, other]))[0, 1].abs() < 0.1


def test_the_global_random_state_is_left_alone() -> None:
    """Only the generator that was handed in is drawn from, once."""
    base, models = mlp()
    before, source = torch.random.get_rng_state(), generator()
    dict(dare_ties(models[0], models[1:], [0.25] * 4, base=base, generator=source))
    assert torch.equal(before, torch.random.get_rng_state())
    expected = generator()
    torch.randint(2**62, (1,), generator=expected)
    assert torch.equal(source.get_state(), expected.get_state())


def test_della_probabilities_by_hand() -> None:
    """Ranks by magnitude within rows, from density − ε/2 to density + ε/2; a vector is one row."""
    rows = torch.tensor([[3.0, -1.0, 2.0], [0.1, 0.3, -0.2]])
    expected = [[0.6, 0.4, 0.5], [0.4, 0.6, 0.5]]
    torch.testing.assert_close(keep_probability(rows, 0.5, 0.2), torch.tensor(expected))
    torch.testing.assert_close(keep_probability(rows[0], 0.5, 0.2), torch.tensor(expected[0]))
    torch.testing.assert_close(keep_probability(rows[:, :1], 0.5, 0.2), torch.full((2, 1), 0.5))
    torch.testing.assert_close(keep_probability(torch.tensor(2.0), 0.5, 0.2), torch.tensor(0.5))
    kernel = keep_probability(torch.randn(4, 3, 3, 3, generator=generator()), 0.5, 0.2)
    assert kernel.shape == (4, 3, 3, 3)
    torch.testing.assert_close(kernel.flatten(1).mean(1), torch.full((4,), 0.5))


def test_della_moments() -> None:
    """Share kept = q by rank, and the rescaled mean is the delta; 40,000 draws."""
    g = generator(3)
    base, own = {"w": torch.zeros(400, 100)}, {"w": torch.randn(400, 100, generator=g)}
    got = della(own, [], [1.0], base=base, generator=g, density=0.5, epsilon=0.6, weights=[1.0])["w"]
    kept, rank = got != 0, own["w"].abs().argsort(1).argsort(1)
    assert float(kept.double().mean()) == pytest.approx(0.5, abs=0.015)
    assert float(kept[rank < 20].double().mean()) == pytest.approx(0.2 + 0.6 * 9.5 / 99, abs=0.03)
    assert float(kept[rank >= 80].double().mean()) == pytest.approx(0.2 + 0.6 * 89.5 / 99, abs=0.03)
    q = keep_probability(own["w"], 0.5, 0.6)
    torch.testing.assert_close(got[kept], (own["w"] / q)[kept])
    raw = della(own, [], [1.0], base=base, generator=g, epsilon=0.6, weights=[1.0], rescale=False)["w"]
    assert torch.equal(raw[raw != 0], own["w"][raw != 0])


def test_della_without_drops_is_ties_or_task_arithmetic() -> None:
    """Density 1, epsilon 0: every way to merge."""
    base, models = mlp()
    weights = [0.1, 0.2, 0.3, 0.4]
    options: dict[str, Any] = {"base": base, "generator": generator(), "density": 1.0, "epsilon": 0.0}
    for how in ("mean", "sum"):
        got = della(models[0], models[1:], weights, merge_func=how, **options)  # type: ignore[arg-type]
        expected = ties(models[0], models[1:], weights, base=base, density=1.0, merge_func=how)  # type: ignore[arg-type]
        assert_golden(got, expected, 0)
    linear = della(models[0], models[1:], weights, merge_func="linear", **options)
    assert_golden(linear, task_arithmetic(models[0], models[1:], weights, base=base), 0)


@pytest.mark.parametrize(("density", "epsilon"), [(1.0, 0.1), (0.05, 0.2), (0.5, 1.0)])
def test_della_probabilities_outside_one_are_errors(density: float, epsilon: float) -> None:
    """Both ends of the window are named."""
    base, models = mlp()
    with pytest.raises(ConfigError, match="choose epsilon"):
        della(models[0], models[1:], [0.25] * 4, base=base, generator=generator(), density=density, epsilon=epsilon)


Method = Callable[..., dict[str, Tensor]]
SPARSE: dict[str, tuple[Method, dict[str, Any]]] = {
    "ties": (ties, {}),
    "ties over the vector": (ties, {"trim": "vector"}),
    "breadcrumbs": (breadcrumbs, {"gamma": 0.1}),
    "dare-linear": (dare_linear, {}),
    "dare-ties": (dare_ties, {"normalize": True}),
    "della": (della, {"epsilon": 0.2}),
}


@pytest.mark.parametrize("name", SPARSE)
def test_a_density_for_each_model(name: str) -> None:
    """A list of equal densities is that density; with others each model is cut by its own, whoever is left out.

    Reference: merges in which one model alone has a coefficient.
    """
    method, options = SPARSE[name]
    g = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(4, 60)}
    drawn = torch.randn(3, 4, 60, generator=g)
    models = [{"w": drawn[k]} for k in range(3)]
    given: dict[str, Any] = {"base": base, "weights": [1.0, 0.5, 0.25], **options}

    def merged(density: Any, **changes: Any) -> Tensor:
        more = {"generator": generator()} if "generator" in inspect.signature(method).parameters else {}
        return method(models[0], models[1:], THIRDS, density=density, **{**given, **more, **changes})["w"]

    assert torch.equal(merged([0.5, 0.5, 0.5]), merged(0.5))
    assert not torch.equal(merged([0.5, 0.5, 0.8]), merged(0.5))
    for k, density in enumerate((0.3, 0.5, 0.8)):
        alone = [float(j == k) for j in range(3)]
        assert torch.equal(merged([0.3, 0.5, 0.8], weights=alone), merged(density, weights=alone))
    with pytest.raises(MergeError, match="option density has 2 numbers for 3 models; give one each, own first"):
        merged([0.5, 0.5])
