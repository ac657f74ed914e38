"""Base-(k+1) graphs (Takezawa et al. 2023): exact, symmetric, k peers at most, as short as the reference counts."""

from __future__ import annotations

import numpy as np
import pytest

from dimat.topology import BaseK, check_matrix, rounds_to_consensus

# rounds to the exact average: table of reference/peers.md
ROUNDS = {
    5: (5, 3, 1),
    8: (3, 3, 2),
    10: (6, 4, 2),
    25: (9, 6, 2),
    100: (11, 8, 3),
    1000: (16, 12, None),
}


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("n", range(1, 41))
def test_exact_average(n: int, k: int) -> None:
    """Law: one period multiplies to the matrix of all 1/n; every round symmetric, doubly stochastic, degree <= k."""
    plan = BaseK([f"a{i}" for i in range(n)], k)
    product = np.eye(n)
    for number in range(1, plan.period + 1):
        weights = plan.mixing(number)
        assert np.allclose(weights, weights.T, atol=1e-15)
        check_matrix(weights, plan.graph(number), doubly=True)
        assert max(map(len, plan.links(number).sources)) <= k
        product = weights @ product
    assert np.allclose(product, 1 / n, atol=1e-13)


@pytest.mark.parametrize("n", sorted(ROUNDS))
def test_as_short_as_the_reference(n: int) -> None:
    """Reference: peers.md, columns Base-2, Base-3, Base-5; no shorter prefix is exact."""
    for k, rounds in zip((1, 2, 4), ROUNDS[n], strict=True):
        plan = BaseK([f"a{i}" for i in range(n)], k)
        if rounds is not None:
            assert plan.period == rounds
            assert rounds_to_consensus(plan, tolerance=1e-10) == rounds


def test_large_networks_are_built_fast() -> None:
    """Reference: the brief, 10,000 agents; 9,973 is prime. All digits pair up, so a period stays about 2 log2 n."""
    plan = BaseK([f"a{i}" for i in range(9973)], 1)
    assert plan.period <= 2 * 14 + 1
    values = np.random.default_rng(0).standard_normal(9973)
    mean = values.mean()
    for number in range(1, plan.period + 1):
        values = plan.sparse_mixing(number) @ values
    assert abs(values - mean).max() < 1e-12
