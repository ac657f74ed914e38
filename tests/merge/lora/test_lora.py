"""LoRA factors merged as products: dense computations of the definitions, Eckart and Young's theorem, exactness."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dimat import merge_weights
from dimat.errors import ConfigError, MergeError
from dimat.merge.lora.factors import FactorPair, find_pairs
from tests.merge.methods import assert_same_bits, combine, worst

METHODS = ["lora-concat", "lora-svd", "lora-lego"]
Model = dict[str, Tensor]


def adapter(
    seed: int, rank: int = 4, rows: int = 9, columns: int = 7, dtype: torch.dtype = torch.float64, name: str = "q"
) -> Model:
    g = torch.Generator().manual_seed(seed)
    return {
        f"{name}.lora_A.weight": torch.randn(rank, columns, generator=g, dtype=torch.float64).to(dtype),
        f"{name}.lora_B.weight": torch.randn(rows, rank, generator=g, dtype=torch.float64).to(dtype),
    }


def product(model: Model, name: str = "q") -> Tensor:
    return model[f"{name}.lora_B.weight"].double() @ model[f"{name}.lora_A.weight"].double()


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def rebased(model: Model, turn: Tensor) -> Model:
    """The same product in another basis: B R, R⁻¹ A."""
    a, b = model.values()
    return dict(zip(model, (torch.linalg.solve(turn, a), b @ turn)))


WEIGHTS = [0.5, 0.3, 0.2]
MODELS = [adapter(k) for k in range(3)]
MEAN = sum((w * product(m) for w, m in zip(WEIGHTS, MODELS)), torch.zeros(9, 7, dtype=torch.float64))


def merged(method: str, models: list[Model], weights: list[float] = WEIGHTS, **options: Any) -> Model:
    return combine(method, models[0], models[1:], weights, **options)


def test_concatenated_factors_are_the_exact_mean() -> None:
    """Reference: Σ w_k B_k A_k, dense; rank Σ r_k, with ranks that differ; `scaling` multiplies it."""
    found = merged("lora-concat", MODELS)
    assert [*found["q.lora_A.weight"].shape] == [12, 7]
    assert relative(product(found), MEAN) < 1e-14
    assert relative(product(merged("lora-concat", MODELS, scaling=-3.0)), -3 * MEAN) < 1e-14
    mixed = [adapter(0), adapter(1, 1), adapter(2, 8)]
    found = merged("lora-concat", mixed)
    assert [*found["q.lora_B.weight"].shape] == [9, 13]
    dense = sum((w * product(m) for w, m in zip(WEIGHTS, mixed)), torch.zeros(9, 7, dtype=torch.float64))
    assert relative(product(found), dense) < 1e-14


@pytest.mark.parametrize("rank", [None, 1, 3, 6, 7])
@pytest.mark.parametrize(("rows", "columns"), [(9, 7), (5, 30), (40, 6), (3, 3)])
def test_svd_is_the_truncated_svd_of_the_dense_mean(rank: int | None, rows: int, columns: int) -> None:
    """Reference: torch's SVD of the dense mean; own's rank unless `rank` says another; balanced factors."""
    models = [adapter(k, 4, rows, columns) for k in range(3)]
    dense = sum((w * product(m) for w, m in zip(WEIGHTS, models)), torch.zeros(rows, columns, dtype=torch.float64))
    found = merged("lora-svd", models, **({} if rank is None else {"rank": rank}), scaling=2.0)
    a, b = found.values()
    assert a.shape[0] == b.shape[1] == (rank or 4)
    assert relative(product(found), 2 * truncated(dense, rank or 4)) < 1e-12
    kept = min(rank or 4, rows, columns)
    torch.testing.assert_close((a @ a.mT)[:kept, :kept], (b.mT @ b)[:kept, :kept], rtol=1e-10, atol=1e-10)


def test_no_other_factors_of_the_rank_are_closer() -> None:
    """Eckart and Young: gradient descent from the result, and from elsewhere, finds nothing nearer the mean."""
    found = merged("lora-svd", MODELS)
    error = (product(found) - MEAN).norm()
    assert error == pytest.approx(float(torch.linalg.svdvals(MEAN)[4:].norm()), rel=1e-12)
    for start in (found, *MODELS, adapter(7)):
        assert nearest(start) >= error * (1 - 1e-9)


def nearest(start: Model) -> Tensor:
    """How near factors of the mean's shape come to it, when they are trained from `start` on."""
    a, b = (tensor.clone().requires_grad_() for tensor in start.values())
    steps = torch.optim.LBFGS([a, b], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        steps.zero_grad()
        value = (b @ a - MEAN).square().sum()
        value.backward()
        return value

    steps.step(loss)
    return (b @ a - MEAN).detach().norm()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**20), rank=st.integers(1, 5), spread=st.floats(0, 3))
def test_property_the_basis_of_factors_does_not_matter(seed: int, rank: int, spread: float) -> None:
    """(B R, R⁻¹ A) of any model merges to the same product, for R with a condition up to 1e3."""
    g = torch.Generator().manual_seed(seed)
    models = [adapter(seed + k, rank) for k in range(3)]
    turns = []
    for _ in range(3):
        left, right = (torch.linalg.qr(torch.randn(rank, rank, generator=g, dtype=torch.float64))[0] for _ in range(2))
        turns.append((left * torch.logspace(0, spread, rank, dtype=torch.float64)) @ right)
    turned = [rebased(model, turn) for model, turn in zip(models, turns)]
    for method in ("lora-concat", "lora-svd"):
        assert relative(product(merged(method, turned)), product(merged(method, models))) < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_peers_does_not_matter(method: str) -> None:
    """The product, to 1e-9."""
    models, weights = [adapter(k) for k in range(4)], [0.4, 0.3, 0.2, 0.1]
    expected = product(merged(method, models, weights))
    for order in permutations((1, 2, 3)):
        shuffled = [models[0], *(models[k] for k in order)]
        assert relative(product(merged(method, shuffled, [0.4, *(weights[k] for k in order)])), expected) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_exactness(method: str, dtype: torch.dtype) -> None:
    """Weight 1 on a model is that model and equal models are themselves, bit for bit (but for lora-concat, whose rank
    grows); types stay; a model of weight 0 takes no part; inputs stay as they were."""
    own, other, wild = (adapter(k, dtype=dtype) for k in range(3))
    copies = [{name: tensor.clone() for name, tensor in model.items()} for model in (own, other)]
    wild = {name: tensor * 1e3 for name, tensor in wild.items()}
    assert_same_bits(merged(method, [own, other], [1.0, 0.0]), own)
    assert_same_bits(merged(method, [own, other], [0.0, 1.0], scaling=5.0), other)
    same = merged(method, [own, own, own])
    if method == "lora-concat":
        assert relative(product(same), product(own)) < {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 1e-6)
    else:
        assert_same_bits(same, own)
    alone = merged(method, [own], [1.0])
    assert all(alone[name].data_ptr() != tensor.data_ptr() for name, tensor in own.items())
    found = merged(method, [own, other], [0.5, 0.5])
    assert all(tensor.dtype == dtype and tensor.isfinite().all() for tensor in found.values())
    assert_same_bits(merged(method, [own, other, wild], [0.5, 0.5, 0.0]), found)
    assert_same_bits(own, copies[0])
    assert_same_bits(other, copies[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_left_to_the_end(dtype: torch.dtype) -> None:
    """Reference: the same numbers in float64."""
    models = [adapter(k, dtype=dtype) for k in range(3)]
    wide = [{name: tensor.double() for name, tensor in model.items()} for model in models]
    for method in METHODS:
        expected = product(merged(method, wide))
        assert relative(product(merged(method, models)), expected) < 4 * torch.finfo(dtype).eps, method


@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_factor_is_averaged(method: str) -> None:
    """Biases, heads, buffers, a base's weights beside the factors; integers are own's."""
    rest = [{"head.bias": torch.tensor([k, 2.0 * k]), "steps": torch.tensor(k)} for k in range(3)]
    found = merged(method, [model | extra for model, extra in zip(MODELS, rest)])
    torch.testing.assert_close(found["head.bias"], torch.tensor([0.7, 1.4]))
    assert found["steps"] == 0
    assert_same_bits(found, merged(method, MODELS) | {key: found[key] for key in rest[0]})
    assert [*found] == [*MODELS[0], *rest[0]]


def test_names() -> None:
    """Reference: the names that PEFT gives, in a living model and in its files."""
    names = [
        "base.q.lora_B.weight",
        "base.q.weight",
        "base.q.lora_A.weight",
        "e.lora_embedding_A",
        "e.lora_embedding_B",
        "v.lora_A.default.weight",
        "v.lora_B.default.weight",
        "v.lora_A.other.weight",
        "v.lora_B.other.weight",
        "e2.lora_embedding_A.default",
        "e2.lora_embedding_B.default",
        "lora_A.weight",
        "lora_B.weight",
        "v.lora_B.bias",
        "myllora_A.weight",
    ]
    assert find_pairs(names) == [
        FactorPair("base.q", "base.q.lora_A.weight", "base.q.lora_B.weight", False),
        FactorPair("e", "e.lora_embedding_A", "e.lora_embedding_B", True),
        FactorPair("v", "v.lora_A.default.weight", "v.lora_B.default.weight", False),
        FactorPair("v[other]", "v.lora_A.other.weight", "v.lora_B.other.weight", False),
        FactorPair("e2", "e2.lora_embedding_A.default", "e2.lora_embedding_B.default", True),
        FactorPair("", "lora_A.weight", "lora_B.weight", False),
    ]


@pytest.mark.parametrize("method", METHODS)
def test_convolutions_and_embeddings(method: str) -> None:
    """A kernel's factors are those of its matrix; an embedding's are a matrix as they are; B may come before A."""
    flat = [adapter(k, columns=12) for k in range(3)]
    expected = merged(method, flat)
    kernels, embeddings = [], []
    for model in flat:
        a, b = model.values()
        kernels.append({"c.lora_B.default.weight": b[:, :, None, None], "c.lora_A.default.weight": a.view(4, 3, 2, 2)})
        embeddings.append({"e.lora_embedding_A": a, "e.lora_embedding_B": b})
    rank = 12 if method == "lora-concat" else 4
    a, b = expected.values()
    kernel = merged(method, kernels)
    assert_same_bits(
        kernel, {"c.lora_B.default.weight": b.view(9, rank, 1, 1), "c.lora_A.default.weight": a.view(rank, 3, 2, 2)}
    )
    assert_same_bits(merged(method, embeddings), {"e.lora_embedding_A": a, "e.lora_embedding_B": b})


@pytest.mark.parametrize("method", ["lora-svd", "lora-lego"])
def test_factors_that_add_nothing_can_still_be_trained(method: str) -> None:
    """Adapters as they begin (B = 0): own's A stays. A and B both zero would have no gradient."""
    fresh = [{n: torch.zeros_like(t) if "lora_B" in n else t for n, t in model.items()} for model in MODELS]
    assert_same_bits(merged(method, fresh), fresh[0])
    negative = {n: -t if "lora_B" in n else t for n, t in MODELS[0].items()}
    if method == "lora-svd":
        found = merged(method, [MODELS[0], negative], [0.5, 0.5])
        assert not found["q.lora_B.weight"].any()
        assert torch.equal(found["q.lora_A.weight"], MODELS[0]["q.lora_A.weight"])


def test_directions_without_a_singular_value_keep_a_row_of_a() -> None:
    """Two adapters of rank 1 in factors of rank 2, one and the same row: a product of rank 1, a live second row."""
    a = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    models = [{"q.lora_A.weight": a, "q.lora_B.weight": torch.tensor([[k, 0.0], [1.0, 0.0]])} for k in (1.0, 2.0)]
    found = merged("lora-svd", models, [0.5, 0.5])
    assert relative(product(found), torch.tensor([[1.5, 3.0, 0.0], [1.0, 2.0, 0.0]])) < 1e-6
    assert found["q.lora_B.weight"][:, 1].abs().max() == 0
    assert found["q.lora_A.weight"][1].norm() > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_faults_are_named(method: str) -> None:
    """A factor alone, factors without a product, of other layers, not finite; options out of range."""
    a, b = MODELS[0].values()
    with pytest.raises(MergeError, match=r"'q\.lora_A\.weight' is a LoRA factor without its lora_B"):
        combine(method, {"q.lora_A.weight": a}, [{"q.lora_A.weight": a}], [0.5, 0.5])
    with pytest.raises(MergeError, match=r"'e\.lora_embedding_B' is a LoRA factor without its lora_A"):
        combine(method, {"e.lora_embedding_B": a}, [{"e.lora_embedding_B": a}], [0.5, 0.5])
    for wrong in (b[:, :3], b[:, 0], torch.zeros(9, 2, 3, 3)):
        with pytest.raises(MergeError, match=r"have no product B·A"):
            merged(method, [{"q.lora_A.weight": a, "q.lora_B.weight": wrong}] * 2, [0.5, 0.5])
    with pytest.raises(MergeError, match=r"peer 0: .*\[4, 8\].* do not fit own, \[4, 7\]"):
        merged(method, [MODELS[0], adapter(1, columns=8)], [0.5, 0.5])
    for value in (torch.nan, torch.inf):
        bad = {name: tensor.clone() for name, tensor in MODELS[1].items()}
        bad["q.lora_B.weight"][0, 0] = value
        with pytest.raises(MergeError, match=r"peer 0: tensor 'q\.lora_B\.weight' holds values that are not finite"):
            merged(method, [MODELS[0], bad], [0.5, 0.5])
    with pytest.raises(ConfigError, match="scaling"):
        merged(method, MODELS, scaling=float("nan"))
    with pytest.raises(ConfigError, match="rank"):
        merged(method, MODELS, rank=0)


def test_models_in_training_keep_their_rank() -> None:
    """Through the pipeline: lora-svd and lora-lego keep own's shapes; what changes them is an error that says so."""
    own, peer = adapter(0), adapter(1)
    for method in ("lora-svd", "lora-lego"):
        found = merge_weights(own, [peer], [0.5, 0.5], method="average", combine=method)
        assert_same_bits(found, merged(method, [own, peer], [0.5, 0.5]))
    for chosen in ("lora-concat", {"name": "lora-svd", "options": {"rank": 2}}):
        with pytest.raises(
            MergeError, match=r"makes tensor 'q\.lora_A\.weight' \[[82], 7\], own is \[4, 7\].*lora-svd"
        ):
            merge_weights(own, [peer], [0.5, 0.5], method="average", combine=chosen)


def test_averaging_factors_is_not_averaging_products() -> None:
    """Why these methods are there: two bases of one adapter average to something else, and lora-svd to the adapter."""
    g = torch.Generator().manual_seed(0)
    turned = rebased(MODELS[0], torch.randn(4, 4, generator=g, dtype=torch.float64))
    assert relative(product(merged("lora-svd", [MODELS[0], turned], [0.5, 0.5])), product(MODELS[0])) < 1e-12
    assert relative(product(merged("average", [MODELS[0], turned], [0.5, 0.5])), product(MODELS[0])) > 0.1
    assert worst(merged("lora-svd", MODELS), merged("lora-svd", MODELS)) == 0
