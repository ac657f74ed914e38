"""Singular value decompositions, where rounding has made singular values that are none."""

from __future__ import annotations

import torch

from dimat.merge.tensors.spectral import orthogonal_factor, svd


def test_singular_vectors_of_rounding_are_zero() -> None:
    """Two equal columns: one direction; its orthogonal factor has norm 1 in all, and zeros elsewhere."""
    column = torch.randn(5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = svd(torch.cat([column, column, torch.zeros(5, 1)], 1))
    assert left[:, 1:].abs().max() == 0
    assert right[1:].abs().max() == 0
    assert values[1:].max() < 1e-12
    turned = orthogonal_factor(torch.cat([column, column, torch.zeros(5, 1)], 1))
    torch.testing.assert_close(turned[:, 0], (column / column.norm() / 2**0.5)[:, 0], rtol=1e-12, atol=1e-12)
    assert turned[:, 2].abs().max() == 0
    assert orthogonal_factor(torch.zeros(3, 2)).abs().max() == 0
