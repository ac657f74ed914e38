"""TSV-M, Iso-C and Iso-CTS: the reference's outputs, formulas, and exactness."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from dimat.errors import ConfigError, MergeError
from tests.merge.methods import Counted, assert_same_bits, combine, golden_mlp, part, state, worst

SPECTRAL = ["tsv-m", "iso-c", "iso-cts"]


@pytest.mark.parametrize(("method", "run"), [("tsv-m", "tsvm"), ("iso-c", "iso_c")])
def test_golden(method: str, run: str) -> None:
    """Reference: fusion_bench 0.2.33 on four tasks, scaling 1, weights 1/4 (its outputs were computed in float32)."""
    base, tasks, outputs = golden_mlp()
    merged = combine(method, tasks[0], tasks[1:], [0.25] * 4, base=base)
    expected = part(outputs, f"{run}.")
    assert expected.keys() == merged.keys()
    assert worst(merged, expected) < 5e-7


def deltas(count: int, rows: int, columns: int) -> tuple[Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(rows)
    base = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    return base, [torch.randn(rows, columns, generator=g, dtype=torch.float64) for _ in range(count)]


def merged_delta(method: str, base: Tensor, taus: list[Tensor], weights: list[float], **options: Any) -> Tensor:
    models = [{"w": base + tau} for tau in taus]
    return combine(method, models[0], models[1:], weights, base={"w": base}, **options)["w"] - base


@pytest.mark.parametrize(("rows", "columns"), [(12, 9), (6, 20), (3, 3), (2, 7)])
def test_iso_c_has_a_flat_spectrum_of_the_sum(rows: int, columns: int) -> None:
    """Reference: singular values all equal to the sum's mean one; singular vectors those of the sum."""
    base, taus = deltas(3, rows, columns)
    merged = merged_delta("iso-c", base, taus, [1 / 3] * 3)
    u, s, v = torch.linalg.svd(taus[0] + taus[1] + taus[2], full_matrices=False)
    torch.testing.assert_close(merged, s.mean() * u @ v, rtol=1e-9, atol=1e-9)
    weighted = merged_delta("iso-c", base, taus, [0.5, 0.5, 0.0])
    u, s, v = torch.linalg.svd(taus[0] + taus[1], full_matrices=False)
    torch.testing.assert_close(weighted, s.mean() * u @ v, rtol=1e-9, atol=1e-9)


def test_iso_c_keeps_a_low_rank_sum_low_rank() -> None:
    """Directions in which the sum is zero are arbitrary; they stay zero."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(10, 8, generator=g, dtype=torch.float64)
    taus = [torch.randn(10, 1, generator=g).double() @ torch.randn(1, 8, generator=g).double() for _ in range(3)]
    for method in ("iso-c", "tsv-m"):
        merged = merged_delta(method, base, taus, [1 / 3] * 3)
        assert int((torch.linalg.svdvals(merged) > 1e-9).sum()) == 3


def test_tsv_m_keeps_tasks_that_do_not_interfere() -> None:
    """Reference: deltas of rank r/n on orthogonal directions are their own singular vectors: the result is the sum."""
    g = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(10, 6, generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))[0]
    taus = [(u[:, k : k + 2] * torch.tensor([3.0, 1.0]).double()) @ v[:, k : k + 2].T for k in (0, 2, 4)]
    base = torch.randn(10, 6, generator=g, dtype=torch.float64)
    merged = merged_delta("tsv-m", base, taus, [1 / 3] * 3)
    torch.testing.assert_close(merged, sum(taus, torch.zeros_like(base)), rtol=1e-9, atol=1e-9)
    weighted = merged_delta("tsv-m", base, taus, [0.5, 0.25, 0.25])
    expected = 1.5 * taus[0] + 0.75 * taus[1] + 0.75 * taus[2]
    torch.testing.assert_close(weighted, expected, rtol=1e-9, atol=1e-9)


def iso_cts_plain(taus: list[Tensor], common: float) -> Tensor:
    """The formula written out, with no regard for rank."""
    n, r = len(taus), min(taus[0].shape)
    s = min(r // n, round((r - int(r * common)) / n))
    c = r - n * s
    u, sigma, v = torch.linalg.svd(torch.stack(taus).sum(0), full_matrices=False)
    lefts, sigmas, rights = [u[:, :c]], [sigma[:c]], [v[:c]]
    for tau in taus:
        x, y, z = torch.linalg.svd(tau - u[:, :c] @ u[:, :c].T @ tau, full_matrices=False)
        lefts, sigmas, rights = [*lefts, x[:, :s]], [*sigmas, y[:s]], [*rights, z[:s]]
    a, _, b = torch.linalg.svd(torch.cat(lefts, 1), full_matrices=False)
    d, _, e = torch.linalg.svd(torch.cat(rights), full_matrices=False)
    return torch.cat(sigmas).mean() * (a @ b) @ (d @ e)


@pytest.mark.parametrize("common", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(24, 16), (10, 30), (3, 5)])
def test_iso_cts(rows: int, columns: int, common: float) -> None:
    """Reference: the formula written out; a flat spectrum of full rank; common = 1 is Iso-C."""
    base, taus = deltas(4, rows, columns)
    merged = merged_delta("iso-cts", base, taus, [0.25] * 4, common=common)
    torch.testing.assert_close(merged, iso_cts_plain(taus, common), rtol=1e-8, atol=1e-8)
    values = torch.linalg.svdvals(merged)
    torch.testing.assert_close(values, values[0].expand_as(values), rtol=1e-8, atol=0)
    if common == 1.0:
        torch.testing.assert_close(merged, merged_delta("iso-c", base, taus, [0.25] * 4), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", SPECTRAL)
def test_permuting_units_permutes_the_result(method: str) -> None:
    """Invariant 3: singular vectors move with their rows and columns."""
    base, taus = deltas(3, 9, 7)
    rows, columns = torch.randperm(9), torch.randperm(7)
    merged = merged_delta(method, base, taus, [0.5, 0.3, 0.2])
    moved = merged_delta(method, base[rows][:, columns], [t[rows][:, columns] for t in taus], [0.5, 0.3, 0.2])
    torch.testing.assert_close(moved, merged[rows][:, columns], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", SPECTRAL)
def test_kernels_are_matrices_and_what_has_no_spectrum_is_averaged(method: str) -> None:
    """A kernel (out, in, h, w) is (out, in · h · w); depthwise kernels, rows and vectors are base + α mean."""
    base, states = state(99), [state(k) for k in range(3)]
    merged = combine(method, states[0], states[1:], [0.5, 0.3, 0.2], base=base, scaling=0.7)
    for name in ("depthwise", "row", "one", "scalar", "bias"):
        mean = 0.5 * states[0][name] + 0.3 * states[1][name] + 0.2 * states[2][name]
        torch.testing.assert_close(merged[name], base[name] + 0.7 * (mean - base[name]), rtol=1e-5, atol=1e-6)
    wide = [{"w": s["conv"].flatten(1)} for s in states]
    kernel = combine(method, wide[0], wide[1:], [0.5, 0.3, 0.2], base={"w": base["conv"].flatten(1)}, scaling=0.7)
    assert torch.equal(merged["conv"].flatten(1), kernel["w"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", SPECTRAL)
def test_exact_where_there_is_nothing_to_merge(method: str, dtype: torch.dtype) -> None:
    """Weight 1 on self and equal models give own bit for bit; half types keep their type."""
    own, other = state(0, dtype), state(1, dtype)
    copy = {name: tensor.clone() for name, tensor in own.items()}
    assert_same_bits(combine(method, own, [other], [1.0, 0.0], scaling=0.5), own)
    for weights in ([1 / 3] * 3, [0.1, 0.2, 0.7], [0.0, 0.5, 0.5]):
        assert_same_bits(combine(method, own, [copy, copy], weights), own)
    merged = combine(method, own, [other], [0.5, 0.5])
    assert all(merged[n].dtype == own[n].dtype and merged[n].isfinite().all() for n in own)
    assert torch.equal(merged["count"], own["count"])
    assert worst(combine(method, own, [other], [0.0, 1.0]), other) < 0.02


@pytest.mark.parametrize("method", SPECTRAL)
def test_order_reading_zero_deltas_and_inputs(method: str) -> None:
    """Peers in any order, each tensor read once; a delta of zeros is finite; inputs stay as they were."""
    base, own, peers = state(99), state(0), [state(k) for k in (1, 2, 3)]
    copies = [{n: t.clone() for n, t in s.items()} for s in (own, *peers)]
    merged = combine(method, own, peers, [0.25] * 4)
    for order in permutations(range(3)):
        assert worst(combine(method, own, [peers[k] for k in order], [0.25] * 4), merged) < 1e-6
    counted = Counted(peers[0])
    combine(method, own, [counted], [0.5, 0.5])
    assert counted.reads == [n for n, t in own.items() if t.is_floating_point() and t.numel()]
    still = combine(method, own, [base, peers[0]], [0.4, 0.3, 0.3], base=base)
    assert all(t.isfinite().all() for t in still.values())
    for before, after in zip(copies, (own, *peers)):
        assert_same_bits(after, before)


@pytest.mark.parametrize("method", SPECTRAL)
def test_faults_are_named(method: str) -> None:
    """No base, another architecture's base, an option out of range."""
    own = {"w": torch.ones(3, 3)}
    with pytest.raises(MergeError, match=f"'{method}' takes task vectors from a base"):
        combine(method, own, [own], [0.5, 0.5])
    with pytest.raises(MergeError, match="no tensor 'w'"):
        combine(method, own, [own], [0.5, 0.5], base={"v": torch.ones(3, 3)})
    with pytest.raises(MergeError, match=r"\[3, 3\], in the base \[2, 3\]"):
        combine(method, own, [own], [0.5, 0.5], base={"w": torch.ones(2, 3)})
    with pytest.raises(ConfigError, match="scaling"):
        combine(method, own, [own], [0.5, 0.5], base=own, scaling=-1.0)
