"""Fisher-weighted average and RegMean: the reference's outputs, formulas, and the statistics they rest on."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dimat.config import MergeConfig
from dimat.errors import MergeError, PeerError
from dimat.merge import MergeContext, Peer, merge, merge_weights, plan_merge
from dimat.merge.models.fisher_information import empirical_fisher
from dimat.merge.models.gram import gram_matrices, pays
from dimat.merge.shared_statistics import in_order
from dimat.symmetry import derive_symmetry, permute_weights
from dimat.symmetry.permute import random_permutations
from tests.merge.methods import assert_same_bits, combine, fishers, golden_mlp, part, state, worst
from tests.merge.networks import ResNet, mlp, randomise

METHODS = ["fisher", "regmean"]


def golden_statistics(outputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The reference's own diagonals and Gram matrices, under our names."""
    listed: list[dict[str, Tensor]] = []
    for k in range(4):
        diagonals = {f"fisher.{name}": t for name, t in part(outputs, f"fisher.w{k}.").items()}
        grams = {f"gram.{name}.weight": t for name, t in part(outputs, f"regmean.gram{k}.").items()}
        listed.append({**diagonals, **grams})
    return listed


@pytest.mark.parametrize(("method", "run"), [("fisher", "fisher_norm"), ("regmean", "regmean_09")])
def test_golden(method: str, run: str) -> None:
    """Reference: fusion_bench 0.2.33 on four tasks with its own statistics, weights 1/4 (computed in float32).

    Fisher: normalised by whole-model norms, minimal 1e-6 added before that, as there.
    """
    _, tasks, outputs = golden_mlp()
    merged = combine(method, tasks[0], tasks[1:], [0.25] * 4, aux=golden_statistics(outputs))
    expected = part(outputs, f"{run}.")
    assert expected.keys() == merged.keys()
    assert worst(merged, expected) < 1e-6


def test_golden_through_merge_weights() -> None:
    """Statistics are handed in own first, and reach the method in that order."""
    _, tasks, outputs = golden_mlp()
    aux = golden_statistics(outputs)
    merged = merge_weights(tasks[0], tasks[1:], [0.25] * 4, "average", combine="regmean", aux=aux)
    assert worst(merged, part(outputs, "regmean_09.")) < 1e-6
    with pytest.raises(MergeError, match="need 4 sets of statistics"):
        merge_weights(tasks[0], tasks[1:], [0.25] * 4, "average", combine="regmean", aux=aux[1:])


def test_fisher_is_the_formula() -> None:
    """Reference: Σ w F θ / Σ w F written out; where nobody has information, the weighted mean."""
    g = torch.Generator().manual_seed(0)
    models = [{"x": torch.randn(6, generator=g, dtype=torch.float64)} for _ in range(3)]
    info = torch.rand(3, 6, generator=g, dtype=torch.float64)
    info[:, 5] = 0
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    aux = [{"fisher.x": f} for f in info]
    values = torch.stack([m["x"] for m in models])
    found = combine("fisher", models[0], models[1:], weights.tolist(), aux, normalise=False, minimal=1e-9)["x"]
    factors = weights[:, None] * (info + 1e-9)
    torch.testing.assert_close(found, (factors * values).sum(0) / factors.sum(0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[5], weights @ values[:, 5], rtol=1e-9, atol=1e-12)
    none = combine("fisher", models[0], models[1:], weights.tolist(), aux, normalise=False, minimal=0.0)["x"]
    assert none.isfinite().all()
    loud = [{"fisher.x": f * (1000 if k == 1 else 1)} for k, f in enumerate(info)]
    one, other = (combine("fisher", models[0], models[1:], weights.tolist(), a, minimal=0.0)["x"] for a in (aux, loud))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    silent = [{"fisher.x": f * (k != 1)} for k, f in enumerate(info)]
    combined = combine("fisher", models[0], models[1:], weights.tolist(), silent)["x"]
    assert (combined.abs() <= values.abs().max() + 1e-9).all()
    torch.testing.assert_close(
        combined[:5],
        combine("fisher", models[0], models[2:], [0.5, 0.2], [silent[0], silent[2]])["x"][:5],
        rtol=1e-3,
        atol=1e-4,
    )


def test_regmean_is_the_least_squares_solution() -> None:
    """Reference: lstsq over all models' inputs stacked; inputs that nobody sees keep the average."""
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(30, 6, generator=g, dtype=torch.float64) for _ in range(3)]
    for x in inputs:
        x[:, 4] = 0
    models = [{"l.weight": torch.randn(3, 6, generator=g, dtype=torch.float64)} for _ in range(3)]
    weights = [0.5, 0.3, 0.2]
    aux = [{"gram.l.weight": x.T @ x} for x in inputs]
    found = combine("regmean", models[0], models[1:], weights, aux, off_diagonal=1.0)["l.weight"]
    seen = [0, 1, 2, 3, 5]
    rows = torch.cat([w**0.5 * x[:, seen] for w, x in zip(weights, inputs)])
    targets = torch.cat([w**0.5 * x @ m["l.weight"].T for w, x, m in zip(weights, inputs, models)])
    expected = torch.linalg.lstsq(rows, targets).solution.T
    torch.testing.assert_close(found[:, seen], expected, rtol=1e-8, atol=1e-8)
    mean = sum(w * m["l.weight"] for w, m in zip(weights, models))
    torch.testing.assert_close(found[:, 4], mean[:, 4], rtol=1e-12, atol=1e-12)
    diagonal = combine("regmean", models[0], models[1:], weights, aux, off_diagonal=0.0)["l.weight"]
    squares = torch.stack([w * x.square().sum(0) for w, x in zip(weights, inputs)])
    weighted = (squares[:, None] * torch.stack([m["l.weight"] for m in models])).sum(0) / squares.sum(0)
    torch.testing.assert_close(diagonal[:, seen], weighted[:, seen], rtol=1e-9, atol=1e-9)


def test_regmean_of_dependent_inputs_keeps_the_average_where_nothing_is_known() -> None:
    """Two equal inputs: a singular Gram matrix; outputs on data are the best, and the rest does not blow up."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=g, dtype=torch.float64)
    x[:, 1] = x[:, 0]
    models = [{"w": torch.randn(2, 5, generator=g, dtype=torch.float64)} for _ in range(2)]
    found = combine("regmean", models[0], models[1:], [0.5, 0.5], [{"gram.w": x.T @ x}] * 2, off_diagonal=1.0)["w"]
    mean = (models[0]["w"] + models[1]["w"]) / 2
    torch.testing.assert_close(found, mean, rtol=1e-9, atol=1e-9)


def test_regmean_goes_no_further_than_its_models_are_large() -> None:
    """Inputs that all but depend on each other, to each model in its own way: by hand W is 15 times as large as any
    model, and is cut on the way from the average to it where ‖W‖² = 1.5² Σ w ‖W_k‖²."""
    g = torch.Generator().manual_seed(0)
    models = [{"w": torch.randn(2, 2, generator=g, dtype=torch.float64)} for _ in range(2)]
    rows = [torch.tensor([[1.0, slope]], dtype=torch.float64) for slope in (1.0, 1.01)]
    aux = [{"gram.w": x.T @ x + 1e-9 * torch.eye(2, dtype=torch.float64)} for x in rows]
    found = combine("regmean", models[0], models[1:], [0.5, 0.5], aux, off_diagonal=1.0)["w"]
    grams, stack = torch.stack([each["gram.w"] for each in aux]), torch.stack([each["w"] for each in models])
    whole = torch.linalg.solve(grams.sum(0), (grams @ stack.mT).sum(0)).mT
    mean, bound = stack.mean(0), 1.5**2 * stack.square().sum((1, 2)).mean()
    assert whole.square().sum() > 20 * bound
    torch.testing.assert_close(found.square().sum(), bound, rtol=1e-9, atol=0)
    share = (found - mean) / (whole - mean)
    torch.testing.assert_close(share, share[0, 0].expand_as(share), rtol=1e-6, atol=1e-9)
    assert 0 < float(share[0, 0]) < 0.2


@pytest.mark.parametrize("liars_scale", [1e6, 1e30, 0.0])
@pytest.mark.parametrize("others", [1, 2])
def test_regmean_is_not_the_model_of_who_claims_the_most(others: int, liars_scale: float) -> None:
    """A peer multiplies its Gram matrix: it counts at most as if it had multiplied it by `most` (reference)."""
    g = torch.Generator().manual_seed(1)
    inputs = [torch.randn(30, 4, generator=g, dtype=torch.float64) for _ in range(others + 1)]
    models = [{"w": torch.randn(3, 4, generator=g, dtype=torch.float64)} for _ in range(others + 1)]
    grams = [x.T @ x / (x.T @ x).trace() for x in inputs]
    shares = [1 / (others + 1)] * (others + 1)

    def merged(scale: float) -> Tensor:
        aux = [{"gram.w": gram} for gram in (*grams[:-1], scale * grams[-1])]
        return combine("regmean", models[0], models[1:], shares, aux, most=5.0)["w"]

    if liars_scale:
        torch.testing.assert_close(merged(liars_scale), merged(5.0), rtol=1e-9, atol=1e-9)
        assert worst({"w": merged(liars_scale)}, models[-1]) > 0.05
    else:
        assert merged(0.0).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_exact_where_there_is_nothing_to_merge(method: str, dtype: torch.dtype) -> None:
    """Weight 1 on self (statistics are not even needed) and equal models give own bit for bit."""
    own, other = state(0, dtype), state(1, dtype)
    copy = {name: tensor.clone() for name, tensor in own.items()}
    assert_same_bits(combine(method, own, [other], [1.0, 0.0], aux=[{}, {}]), own)
    for weights in ([1 / 3] * 3, [0.1, 0.2, 0.7], [0.0, 0.5, 0.5]):
        assert_same_bits(combine(method, own, [copy, copy], weights), own)
    merged = combine(method, own, [other], [0.5, 0.5])
    assert all(merged[n].dtype == own[n].dtype and merged[n].isfinite().all() for n in own)
    assert torch.equal(merged["mask"], own["mask"])
    assert worst(combine(method, own, [other], [0.0, 1.0]), other) < (1e-6 if dtype.itemsize > 2 else 0.02)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_peers_does_not_matter(method: str) -> None:
    """Statistics move with their peers."""
    own, peers, aux, weights = state(0), [state(k) for k in (1, 2, 3)], [fishers(k) for k in range(4)], [0.4, 0.3, 0.2]
    merged = combine(method, own, peers, [*weights, 0.1], aux)
    for order in permutations(range(3)):
        mixing = [0.4, *([0.3, 0.2, 0.1][k] for k in order)]
        again = combine(method, own, [peers[k] for k in order], mixing, [aux[0], *(aux[k + 1] for k in order)])
        assert worst(again, merged) < 1e-6


@pytest.mark.parametrize(("method", "how"), [("fisher", "empirical_fisher"), ("regmean", "gram_matrices")])
def test_missing_statistics_are_named(method: str, how: str) -> None:
    """Who has none, and which function computes them; a tensor that only some have."""
    own, prefix = state(0), "fisher." if method == "fisher" else "gram."
    for aux, who in (([{}, fishers(1)], "own weights"), ([fishers(0), {}], "peer 0")):
        with pytest.raises(MergeError, match=rf"{who} came without: see .*{how}"):
            combine(method, own, [own], [0.5, 0.5], aux=aux)
    short = {k: t for k, t in fishers(1).items() if k != f"{prefix}linear"} | {f"{prefix}extra": torch.zeros(1)}
    with pytest.raises(MergeError, match=f"peer 0 sent no '{prefix}linear'"):
        combine(method, own, [own], [0.5, 0.5], aux=[fishers(0), short])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("fisher.0.weight", torch.ones(2, 2), r"\[2, 2\], expected \[3, 4\]"),
        ("fisher.0.weight", -torch.ones(3, 4), "negative or not finite"),
        ("fisher.0.weight", torch.full((3, 4), float("nan")), "negative or not finite"),
        ("fisher.7.weight", torch.ones(3, 4), "belongs to no tensor of the model"),
        ("gram.0.weight", torch.ones(3, 3), r"\[3, 3\], expected \[4, 4\]"),
        ("gram.0.weight", -torch.eye(4), "negative or not finite"),
        ("gram.0.bias", torch.ones(3, 3), r"expected \[\]"),
        ("gram.0.weight", torch.eye(4) + torch.ones(4, 4).triu(1), "not a Gram matrix"),
        ("gram.0.weight", 2 * torch.ones(4, 4) - torch.eye(4), "not a Gram matrix"),
    ],
)
def test_statistics_are_screened(key: str, value: Tensor, message: str) -> None:
    """A peer whose statistics cannot be right is refused whole, as one whose weights cannot."""
    own = nn.Sequential(nn.Linear(4, 3)).state_dict()
    plan = plan_merge(MergeConfig(method="average"))
    context = MergeContext(aux={"b": {key: value}})
    outcome = merge(own, 0.5, [Peer("b", own, 0.5)], plan, context)
    assert outcome.own_weight == 1
    with pytest.raises(PeerError, match=message):
        merge(own, 0.5, [Peer("b", own, 0.5)], plan, context, refuse=False)


def test_statistics_follow_their_peer_into_own_basis() -> None:
    """Reference: statistics of the permuted model, taken anew. Fisher diagonals move as their tensors do, Gram
    matrices as their layer's inputs, rows and columns alike."""
    g = torch.Generator().manual_seed(0)
    model = randomise(mlp(), 0)
    images, labels = torch.randn(12, 3, 4, 4, generator=g), torch.randint(0, 5, (12,), generator=g)
    spec = derive_symmetry(model, (images,))
    moves = random_permutations(spec, g)
    moved = permute_weights(model.state_dict(), spec, moves)
    before = {**empirical_fisher(model, [(images, labels)]), **gram_matrices(model, [(images,)])}
    after = {**empirical_fisher(model, [(images, labels)], moved), **gram_matrices(model, [(images,)], moved)}
    listed = in_order({"b": before}, ["a", "b"], {"b": moves}, spec)
    assert listed is not None
    assert [len(aux) for aux in listed] == [0, 0, len(before)]
    assert not torch.equal(before["gram.3.weight"], after["gram.3.weight"])
    for name, expected in after.items():
        torch.testing.assert_close(listed[2][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_merging_with_a_permuted_self_returns_self(method: str) -> None:
    """Align, then combine, with statistics in the peer's own basis."""
    g = torch.Generator().manual_seed(0)
    model = randomise(mlp(), 0)
    images, labels = torch.randn(64, 3, 4, 4, generator=g), torch.randint(0, 5, (64,), generator=g)
    own = {n: t.clone() for n, t in model.state_dict().items()}
    spec = derive_symmetry(model, (images,))
    peer = permute_weights(own, spec, random_permutations(spec, g))

    def statistics(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**empirical_fisher(model, [(images, labels)], weights), **gram_matrices(model, [(images,)], weights)}

    merged = merge_weights(
        own,
        [peer],
        [0.5, 0.5],
        "dimat",
        model=model,
        data=[images],
        spec=spec,
        combine=method,
        aux=[statistics(own), statistics(peer)],
    )
    assert worst(merged, own) < 1e-6


# the statistics themselves


def by_hand(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Backward passes of one example each."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for image, label in zip(images, labels):
        model.zero_grad()
        F.cross_entropy(model(image[None]), label[None]).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                sums[name] += p.grad.square() / len(images)
    model.zero_grad()
    return sums


@pytest.mark.parametrize("build", [mlp, lambda: ResNet(widths=(4, 6, 8))])
def test_empirical_fisher_is_the_mean_of_squared_gradients(build: Any) -> None:
    """Reference: one backward pass per example. Batches, chunks and the model's mode do not matter; nothing changes."""
    g = torch.Generator().manual_seed(0)
    model = randomise(build(), 0)
    side = 4 if isinstance(model, nn.Sequential) else 8
    images, labels = torch.randn(10, 3, side, side, generator=g), torch.randint(0, 5, (10,), generator=g)
    expected = by_hand(model, images, labels)
    model.train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = empirical_fisher(model, [(images[:7], labels[:7]), (images[7:], labels[7:])], chunk=3)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert_same_bits(model.state_dict(), before)
    assert found.keys() == {f"fisher.{name}" for name in expected}
    for name, diagonal in expected.items():
        torch.testing.assert_close(found[f"fisher.{name}"], diagonal, rtol=1e-4, atol=1e-7)
    few = empirical_fisher(model, [(images, labels)], max_examples=4)
    model.eval()
    for name, diagonal in by_hand(model, images[:4], labels[:4]).items():
        torch.testing.assert_close(few[f"fisher.{name}"], diagonal, rtol=1e-4, atol=1e-7)


def test_gram_matrices_are_those_of_the_inputs() -> None:
    """Reference: xᵀx of activations computed layer by layer; sequences count every position."""
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 2)).train()
    x = torch.randn(8, 5, 4, generator=g)
    found = gram_matrices(model, [(x[:3],), (x[3:],)])
    hidden = torch.relu(model[0](x)).detach().flatten(0, 1)
    assert found.keys() == {"gram.0.weight", "gram.3.weight"}
    torch.testing.assert_close(found["gram.0.weight"], x.flatten(0, 1).T @ x.flatten(0, 1) / 40, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["gram.3.weight"], hidden.T @ hidden / 40, rtol=1e-5, atol=1e-6)
    assert model.training
    few = gram_matrices(model, [(x,)], max_examples=2)["gram.0.weight"]
    torch.testing.assert_close(few, x[:2].flatten(0, 1).T @ x[:2].flatten(0, 1) / 10, rtol=1e-5, atol=1e-6)


def test_when_regmean_pays() -> None:
    """References: numbers of Gram matrices and parameters, counted by hand; a tied head; nothing to fit; a layer that
    is never called as a module."""
    images, rows = torch.randn(2, 8, 3, 3), torch.randn(2, 64)
    head = nn.Sequential(nn.Conv2d(8, 32, 3), nn.Flatten(), nn.Linear(32, 10))  # 1,024 of 2,666
    square = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64))  # 4,352 of 5,248
    wide = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))  # 8,192 of 4,810
    assert [pays(head, (images,)), pays(square, (rows[:, :16],)), pays(wide, (rows,))] == [True, True, False]
    assert not pays(nn.Sequential(nn.Conv2d(8, 32, 3), nn.ReLU()), (images,))
    assert pays(Shared(whole=True), (rows[:, :4],))  # its Gram matrix holds the inputs of both places
    assert not pays(Shared(whole=False), (rows[:, :4],))
    tied = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 100, bias=False))
    words = torch.zeros(2, 3, dtype=torch.int64)
    assert pays(tied, (words,))
    tied[1].weight = tied[0].weight
    assert not pays(tied, (words,))
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    assert not pays(attention, (rows[:, None, :16],) * 3)


class Shared(nn.Module):
    """One layer in two places, or two layers with one tensor."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first if whole else nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("whole", [True, False])
def test_tied_layers_have_statistics_under_each_name(whole: bool) -> None:
    """State dicts list a tied tensor twice, and both entries are merged. The model's own tensors are in place after."""
    g = torch.Generator().manual_seed(0)
    model, x, y = Shared(whole), torch.randn(6, 4, generator=g), torch.randint(0, 4, (6,), generator=g)
    before = dict(model.named_parameters(remove_duplicate=False))
    at = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    info, grams = empirical_fisher(model, [(x, y)], at), gram_matrices(model, [(x,)], at)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is tensor for name, tensor in before.items())
    assert torch.equal(info["fisher.first.weight"], info["fisher.second.weight"])
    assert torch.equal(grams["gram.first.weight"], grams["gram.second.weight"]) == whole
    assert info.keys() == {f"fisher.{name}" for name in at}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    hidden = torch.tanh(model.first(x)).detach()
    seen = torch.cat([x, hidden]) if whole else x
    torch.testing.assert_close(grams["gram.first.weight"], seen.T @ seen / len(seen), rtol=1e-5, atol=1e-6)
    for name, expected in by_hand(model, x, y).items():
        torch.testing.assert_close(info[f"fisher.{name}"], expected, rtol=1e-4, atol=1e-7)


def test_no_data_and_values_that_are_not_finite() -> None:
    """One-line errors that say what to do."""
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.full((2, 4), float("nan"))
    with pytest.raises(MergeError, match="at least one batch"):
        empirical_fisher(model, [])
    with pytest.raises(MergeError, match="at least one batch"):
        gram_matrices(model, [])
    with pytest.raises(MergeError, match=r"'0.weight' is not finite"):
        empirical_fisher(model, [(x, torch.zeros(2, dtype=torch.long))])
    with pytest.raises(MergeError, match=r"'0.weight' are not finite"):
        gram_matrices(model, [(x,)])
