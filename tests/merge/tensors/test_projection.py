"""The projection of OPCM: the golden vectors of both variants, and its laws."""

from __future__ import annotations

import json
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat.merge.combine.opcm import opcm
from dimat.merge.tensors import projection as projection_module
from dimat.merge.tensors.projection import fold_, project, split_ranks
from tests.merge.opcm_reference import (
    BASE,
    FACTS,
    TASKS,
    TENSORS,
    VARIANTS,
    assert_bits,
    assert_close,
    drawn,
    length,
    merged_delta,
    part,
    plain_fold,
    plain_projection,
    stream,
)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_step_of_the_golden_run(variant: str, dtype: str) -> None:
    """Reference: opcm_mlp, all steps: weights to 1e-6 of the largest, λ to 1e-9 (1e-7 with M in float32), norms."""
    facts, state = FACTS[variant]["mlp"], dict[str, Any]()
    for step, task in enumerate(TASKS):
        weights = stream(state, f"t{step}", task, alpha=facts["alpha"], diagonal=VARIANTS[variant], state_dtype=dtype)
        close = 1e-9 if dtype == "float64" else 1e-7
        assert state["opcm/lambda"] == pytest.approx(facts["lambda"][step], abs=close)
        assert length(merged_delta(state)) == pytest.approx(facts["merged_norm"][step], rel=close)
        assert json.loads(state["opcm/norms"])[f"t{step}"] == pytest.approx(facts["task_norm"][step], rel=1e-9)
        assert state["opcm/count"] == step + 1
        assert all(t.dtype == getattr(torch, dtype) for t in merged_delta(state).values())
        assert_close(weights, part(TENSORS, f"{variant}.step{step}.") if step else task, 1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_split_ranks_of_the_golden_run(variant: str) -> None:
    """Reference: `split_ranks_in_order`, three matrices at each of three steps."""
    names = ["fc1.weight", "fc2.weight", "head.weight"]
    totals = {name: (TASKS[0][name].double() - BASE[name].double())[None] for name in names}
    ranks: list[int] = []
    for task in TASKS[1:]:
        for name, total in totals.items():
            ranks += fold_(total, (task[name].double() - BASE[name].double())[None], 0.5, VARIANTS[variant])
    assert ranks == FACTS[variant]["mlp"]["split_ranks_in_order"]


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_fold_is_the_plain_formula_in_one_of_the_orders(diagonal: bool) -> None:
    """Reference: `plain_fold`. Whichever agent is own and however peers are listed, the order is the same one."""
    orders = [plain_fold(BASE, [TASKS[k] for k in order], 0.5, diagonal)[0] for order in permutations(range(4))]
    results = [
        opcm(TASKS[a], [TASKS[b], TASKS[c], TASKS[d]], [0.25] * 4, base=BASE, diagonal=diagonal)
        for a, b, c, d in permutations(range(4))
    ]
    for result in results[1:]:
        assert_bits(result, results[0])
    errors = [max(float((results[0][n].double() - o[n]).abs().max()) for n in BASE) for o in orders]
    assert sum(error < 1e-7 for error in errors) == 1
    assert max(errors) > 1e-3  # so that the order is seen to matter


def test_products_in_float32_are_good_to_six_digits() -> None:
    """Reference: the same fold with products in float64."""
    exact, quick = (
        opcm(TASKS[0], TASKS[1:], [0.25] * 4, base=BASE, products=dtype) for dtype in ("float64", "float32")
    )
    assert_close(quick, exact, 1e-6)


SHAPES = [(5, 3), (64, 32), (96, 70), (70, 96), (1, 7), (7, 1), (1, 1), (60, 60)]


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_cheap_forms_are_the_definition(shape: tuple[int, int], alpha: float, diagonal: bool) -> None:
    """Reference: `plain_projection` by a full SVD in float64, for spectra that are flat and that fall fast."""
    for power in (0, 1, 3):
        falling = torch.arange(1, shape[1] + 1, dtype=torch.float64) ** -power
        delta, merged = drawn(1, *shape), drawn(2, *shape) * falling
        expected, k = plain_projection(delta, merged, alpha, diagonal)
        torch.testing.assert_close(project(delta, merged, alpha, diagonal=diagonal), expected, rtol=0, atol=1e-8)
        assert fold_(merged.clone()[None], delta[None], alpha, diagonal) == [k]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    rank=st.integers(0, 12),
    alpha=st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]),
    diagonal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_laws_of_the_projection(rows: int, columns: int, rank: int, alpha: float, diagonal: bool, seed: int) -> None:
    """⟨C, u_i v_jᵀ⟩ = 0 for i, j < k; ⟨C, M⟩ = 0 with `diagonal`; C(Tᵀ) = C(T)ᵀ; M's length does not matter; M may
    have any rank."""
    delta = drawn(seed, rows, columns)
    merged = drawn(seed + 1, rows, rank) @ drawn(seed + 2, rank, columns)
    added = project(delta, merged, alpha, diagonal=diagonal)
    assert torch.isfinite(added).all()
    u, sigma, vh = torch.linalg.svd(merged, full_matrices=False)
    sigma = torch.where(sigma > 1e-12 * sigma.max(), sigma, 0)
    k = int(split_ranks(sigma[None], alpha))
    assert (u[:, :k].T @ added @ vh[:k].T).abs().max().item() < 1e-8 if k else True
    if diagonal:
        assert abs(float((added * merged).sum())) < 1e-10 * max(float(merged.norm()), 1.0)
    if alpha == 0 and not diagonal:
        assert torch.equal(added, delta)
    turned = project(delta.T, merged.T, alpha, diagonal=diagonal).T
    torch.testing.assert_close(turned, added, rtol=0, atol=1e-9)
    torch.testing.assert_close(project(delta, merged * 1e6, alpha, diagonal=diagonal), added, rtol=0, atol=1e-9)


def test_split_ranks_are_the_first_index_whose_share_exceeds_alpha() -> None:
    """By hand: shares of (4, 3, 2, 1) are 0.4, 0.7, 0.9, 1; of (1, 0, 0, 0) all 1; of zeros none."""
    sigma = torch.tensor([[4.0, 3, 2, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    expected = {0.0: [0, 0, 0], 0.39: [0, 0, 0], 0.5: [1, 0, 0], 0.75: [2, 0, 0], 0.95: [3, 0, 0], 1.0: [4, 1, 0]}
    for alpha, ranks in expected.items():
        assert split_ranks(sigma, alpha).tolist() == ranks


@pytest.mark.parametrize("diagonal", [False, True])
def test_batches_are_their_matrices(diagonal: bool) -> None:
    """Reference: one matrix at a time. Ranks differ within the batch, one is of low rank and one is zero."""
    delta, merged = drawn(3, 5, 80, 64), drawn(4, 5, 80, 64)
    merged[1] *= torch.arange(1, 65, dtype=torch.float64) ** -1.0
    merged[2] = drawn(5, 80, 3) @ drawn(6, 3, 64)
    merged[3] = 0
    expected = torch.stack([project(d, m, 0.6, diagonal=diagonal) for d, m in zip(delta, merged)])
    torch.testing.assert_close(project(delta, merged, 0.6, diagonal=diagonal), expected, rtol=0, atol=1e-10)


def test_where_lapack_gives_up_another_solver_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the same projection by the tridiagonal form."""
    delta, merged = drawn(7, 70, 64), drawn(8, 70, 64)
    expected = project(delta, merged, 0.5)
    monkeypatch.setattr(projection_module, "_by_tridiagonal", lambda *_: None)
    torch.testing.assert_close(project(delta, merged, 0.5), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["blocks", "diagonal", "permuted", "few columns", "geometric", "long", "short"])
def test_matrices_whose_tridiagonal_falls_apart(kind: str) -> None:
    """Reference: `plain_projection`. Exact zeros next to the diagonal, clusters at 0 and lengths near overflow are
    where inverse iteration could go wrong unseen; `long` is where it does, and is found out."""
    n, square = 96, drawn(11, 96, 96)
    merged = {
        "blocks": torch.block_diag(*drawn(12, 12, 8, 8)),
        "diagonal": torch.diag(drawn(13, n).abs()),
        "permuted": torch.eye(n).double()[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
        * torch.linspace(1, 2, n, dtype=torch.float64),
        "few columns": square * (torch.arange(n) % 3 == 0),
        "geometric": square * 0.9 ** torch.arange(n, dtype=torch.float64),
        "long": square * 1e150,
        "short": square * 1e-150,
    }[kind]
    delta = drawn(14, n, n)
    for alpha in (0.1, 0.3, 0.5):
        expected, _ = plain_projection(delta, merged, alpha, False)
        torch.testing.assert_close(project(delta, merged, alpha), expected, rtol=0, atol=1e-11)
        turned = project(delta.T.contiguous(), merged.T.contiguous(), alpha)
        torch.testing.assert_close(turned, expected.T, rtol=0, atol=1e-11)
