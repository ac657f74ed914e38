"""Natures of state-dict entries: what each combine method must leave true, whatever it does with numbers."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm

from dimat import merge_weights
from dimat.config import MergeConfig
from dimat.errors import MergeError, PeerError
from dimat.merge import MergeContext, Peer, merge, plan_merge
from dimat.merge.natures import Nature, natures_of

BASED = (
    *("task-arithmetic", "ties", "dare-linear", "dare-ties", "della", "breadcrumbs", "consensus", "sce", "pcb-merging"),
    *("magmax", "emr", "iso-c", "iso-cts", "tsv-m", "opcm", "model-stock"),
)
BASELESS = (
    *("average", "coordinate-median", "trimmed-mean", "geometric-median", "krum", "karcher", "slerp", "nuslerp"),
    "clipped-gossip",
)


class Mixed(nn.Module):
    """A layer with a BatchNorm, a mask of −∞ and one tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.head = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6, bias=False)
        self.head.weight = self.one.weight
        self.register_buffer("mask", torch.full((6, 6), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.one(x)))


def mixed(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = Mixed()
    for _ in range(3):
        model(torch.randn(32, 6))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def combined(method: str, own: Mapping[str, Tensor], peer: Mapping[str, Tensor], **more: object) -> dict[str, Tensor]:
    base = {"base": mixed(9)} if method in BASED else {}
    generator = torch.Generator().manual_seed(0)
    return merge_weights(
        own,
        [peer],
        [0.5, 0.5],
        method="average",
        combine=method,
        generator=generator,
        model=Mixed(),
        **base,
        **more,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("method", [*BASELESS, *BASED])
def test_every_method_keeps_constants_variances_and_ties(method: str) -> None:
    """A mask of −∞ stays bit for bit, no variance is negative, both names of a tied tensor have equal values."""
    own = mixed(0)
    merged = combined(method, own, mixed(1))
    assert torch.equal(merged["mask"], own["mask"])
    assert (merged["norm.running_var"] >= 0).all()
    assert torch.equal(merged["head.weight"], merged["one.weight"])
    assert all(t.isfinite().all() for name, t in merged.items() if name != "mask")


def test_a_variance_that_a_method_takes_below_zero_is_the_weighted_mean() -> None:
    """Task arithmetic with a large scaling extrapolates; the variance is then (var_own + var_peer) / 2."""
    own, peer = mixed(0), mixed(1)
    own["norm.running_var"] = torch.full((6,), 0.1)
    peer["norm.running_var"] = torch.full((6,), 0.3)
    base = mixed(9) | {"norm.running_var": torch.full((6,), 1.0)}
    merged = merge_weights(
        own, [peer], [0.5, 0.5], method="average", combine="task-arithmetic", scaling=3.0, base=base, model=Mixed()
    )
    assert merged["norm.running_var"] == pytest.approx(torch.full((6,), 0.2))


@pytest.mark.parametrize("model", [Mixed(), None])
def test_a_peer_with_a_negative_variance_is_refused(model: nn.Module | None) -> None:
    """Under `average` it would be half of a negative number, and NaN for the whole network."""
    bad = mixed(1)
    bad["norm.running_var"][2:4] = -5.0
    with pytest.raises(PeerError, match=r"'norm.running_var' is a variance and holds 2 values below 0"):
        merge_weights(mixed(0), [bad], [0.5, 0.5], method="average", model=model)


def test_a_constant_that_differs_is_refused() -> None:
    """Own has a mask of −∞, the peer another one."""
    bad = mixed(1)
    bad["mask"] = bad["mask"].mT.contiguous()
    with pytest.raises(PeerError, match="'mask' is a constant that is not finite, and differs from ours"):
        merge_weights(mixed(0), [bad], [0.5, 0.5], method="average")


@pytest.mark.parametrize("method", ["average", "slerp", "coordinate-median", "dare-linear"])
def test_masks_of_pruned_layers_stay_own(method: str) -> None:
    """Half a mask is none: each agent keeps its own places, and the weights below are merged. Zeros that are no mask,
    such as a running mean at its start, are numbers."""

    def pruned(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return prune.random_unstructured(nn.Linear(6, 5), "weight", amount=0.5)

    own, peer = pruned(0), pruned(1)
    assert not torch.equal(own.weight_mask, peer.weight_mask)
    more = {} if method != "dare-linear" else {"base": pruned(2).state_dict(), "generator": torch.Generator()}
    for model in (own, None):
        merged = merge_weights(
            own.state_dict(), [peer.state_dict()], [0.5, 0.5], "average", combine=method, model=model, **more
        )
        assert torch.equal(merged["weight_mask"], own.weight_mask)
        assert not torch.equal(merged["weight_orig"], own.weight_orig)
    whole = {"w": torch.zeros(4), "weight_mask": torch.ones(4)}  # before anything is pruned
    later = {"w": torch.ones(4), "weight_mask": torch.tensor([0.0, 1, 1, 0])}
    assert merge_weights(whole, [later], [0.5, 0.5], "average")["weight_mask"].tolist() == [1, 1, 1, 1]
    assert merge_weights(later, [whole], [0.5, 0.5], "average")["weight_mask"].tolist() == [0, 1, 1, 0]
    zeros, ones = {"w": torch.zeros(3), "ema": torch.zeros(3)}, {"w": torch.ones(3), "ema": torch.tensor([0.0, 1, 0.5])}
    assert merge_weights(zeros, [ones], [0.5, 0.5], "average")["ema"].tolist() == [0, 0.5, 0.25]


def test_an_infinite_parameter_is_no_constant() -> None:
    """A weight with one overflowed value among others is a fault, with a model and without one."""
    own = mixed(0)
    own["one.weight"][0, 0] = torch.inf
    for model in (Mixed(), None):
        with pytest.raises(MergeError, match=r"own weights: tensor 'one.weight' holds 1 values that are not finite"):
            merge_weights(own, [mixed(1)], [0.5, 0.5], method="average", model=model)


@pytest.mark.parametrize("accept", ["always", "no-worse"])
def test_a_merge_that_is_not_finite_is_not_kept(accept: str) -> None:
    """float16 overflows where the difference of two large weights is scaled: own weights go on, and a note says so;
    the rule that accepts merges is not asked, whatever it would say."""
    own = {"w": torch.tensor([40000.0, 1.0]).half()}
    peer = Peer("lab-b", {"w": torch.tensor([40000.0, 2.0]).half()}, 0.5)
    plan = plan_merge(
        MergeConfig.model_validate(
            {
                "method": "average",
                "combine": {"name": "task-arithmetic", "options": {"scaling": 3.0}},
                "accept": {"name": accept},
            }
        )
    )
    asked: list[Mapping[str, Tensor]] = []

    def score(weights: Mapping[str, Tensor]) -> float:
        asked.append(weights)
        return float(len(asked))

    outcome = merge(own, 0.5, [peer], plan, MergeContext(score=score, base={"w": torch.zeros(2).half()}))
    assert not asked
    assert outcome.accepted == 0
    assert torch.equal(outcome.weights["w"], own["w"])
    assert outcome.notes == (
        "warning: the merge's tensor 'w' holds 1 values that are not finite: the merge is not kept, own weights stay",
    )


@pytest.mark.parametrize("form", [spectral_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("layer", [nn.Linear(5, 7), nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3)])
def test_u_and_v_are_the_singular_vectors_of_the_merged_weight(form: object, layer: nn.Module) -> None:
    """Against `torch.linalg.svd` of the merged weight, rows along the axis that torch itself takes."""
    torch.manual_seed(0)
    one = form(copy.deepcopy(layer))  # type: ignore[operator]
    rows = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    states: list[dict[str, Tensor]] = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        for p in one.parameters():
            nn.init.normal_(p)
        for _ in range(30):
            one(torch.randn(2, 5) if isinstance(layer, nn.Linear) else torch.randn(2, layer.in_channels, 6, 6))
        states.append({name: tensor.clone() for name, tensor in one.state_dict().items()})
    merged = merge_weights(states[0], [states[1]], [0.5, 0.5], method="average")
    weight = next(t for name, t in merged.items() if name.endswith(("original", "_orig")))
    u = next(t for name, t in merged.items() if name.endswith("_u"))
    v = next(t for name, t in merged.items() if name.endswith("_v"))
    matrix = weight.movedim(rows, 0).flatten(1)
    assert float(u @ matrix @ v) == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-5)
    assert float(u.norm()) == pytest.approx(1, abs=1e-5)


def test_u_and_v_of_the_other_sign_merge_to_own() -> None:
    """(u, v) and (−u, −v) are one function; their mean is 0."""
    torch.manual_seed(0)
    one = spectral_norm(nn.Linear(5, 7))
    own = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    peer = {name: -tensor if name.endswith(("_u", "_v")) else tensor.clone() for name, tensor in own.items()}
    merged = merge_weights(own, [peer], [0.5, 0.5], method="average")
    assert all(torch.equal(merged[name], own[name]) for name in own)


CODED = {
    "a scale of its name": {"l.weight": torch.tensor([[3, -4]], dtype=torch.int8), "l.weight_scale": torch.ones(1)},
    "fp8": {"l.weight": torch.ones(1, 2).to(torch.float8_e4m3fn), "l.weight_scale_inv": torch.ones(1)},
    "packed by GPTQ": {
        "l.qweight": torch.ones(2, 2).int(),
        "l.qzeros": torch.ones(1, 2).int(),
        "l.scales": torch.ones(1, 2),
    },
    "without a scale": {"l.weight": torch.tensor([[3, -4]], dtype=torch.int8), "l.bias": torch.ones(1)},
}


@pytest.mark.parametrize("form", CODED)
@pytest.mark.parametrize("method", ["average", "task-arithmetic", "slerp", "coordinate-median"])
def test_quantised_weights_are_merged_only_where_they_are_equal(form: str, method: str) -> None:
    """A mean of codes is no weight, and a scale fits no other codes; a frozen base is equal everywhere."""
    own = {**CODED[form], "b": torch.zeros(1)}
    peer = {name: tensor.clone() for name, tensor in own.items()} | {"b": torch.ones(1)}
    more = {"base": own} if method == "task-arithmetic" else {}
    merged = merge_weights(own, [peer], [0.5, 0.5], method="average", combine=method, **more)
    assert all(torch.equal(merged[name], own[name]) for name in CODED[form])
    assert merged["b"] != 0 or method == "task-arithmetic"
    for name in CODED[form]:
        if name == "l.bias":
            continue
        other = peer | {name: (peer[name].float() + 1).to(peer[name].dtype)}
        with pytest.raises(PeerError, match=rf"tensor '{name}' belongs to a quantised weight.*dequantised"):
            merge_weights(own, [other], [0.5, 0.5], method="average", combine=method, **more)


def test_indices_and_observers_are_no_codes() -> None:
    """Integers of 64 bits that are called like a weight, and an observer's scale beside another layer's codes."""
    own = {
        "hash_proj": torch.tensor([[1, 2]]),
        "q.weight": torch.ones(2, 2, dtype=torch.int8),
        "q.weight_scale": torch.ones(1),
    }
    own |= {"o.scale": torch.ones(1), "o.zero_point": torch.tensor([0], dtype=torch.int32), "w": torch.zeros(1)}
    peer = {name: tensor.clone() for name, tensor in own.items()}
    peer |= {"hash_proj": torch.tensor([[3, 4]]), "o.scale": torch.full((1,), 2.0), "w": torch.ones(1)}
    assert merge_weights(own, [peer], [0.5, 0.5], "average")["w"] == 0.5


def test_observed_scales_beside_weights_that_are_numbers_stay_own() -> None:
    """Training with fake quantisation: each agent's observer has seen other data, and goes on from its own."""
    own = {"l.weight": torch.zeros(2, 2), "q.scale": torch.ones(1), "q.zero_point": torch.tensor([3])}
    peer = {"l.weight": torch.ones(2, 2), "q.scale": torch.full((1,), 2.0), "q.zero_point": torch.tensor([5])}
    merged = merge_weights(own, [peer], [0.5, 0.5], method="average")
    assert (merged["l.weight"] == 0.5).all()
    assert merged["q.scale"] == 1
    assert merged["q.zero_point"] == 3


def test_natures_of_a_model_and_of_its_file() -> None:
    """Modules and names agree."""
    model = nn.Sequential(spectral_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3))
    expected = {
        "0.parametrizations.weight.0._u": Nature.VECTOR,
        "0.parametrizations.weight.0._v": Nature.VECTOR,
        "1.running_mean": Nature.MEAN,
        "1.running_var": Nature.VARIANCE,
        "1.num_batches_tracked": Nature.COUNT,
    }
    assert natures_of(model.state_dict(), model).kinds == expected
    assert natures_of(model.state_dict()).kinds == expected


@pytest.mark.parametrize("method", ["average", "dare-linear", "della"])
@pytest.mark.parametrize("model", [Mixed(), None])
def test_tied_tensors_stored_once_or_twice_stay_equal(method: str, model: nn.Module | None) -> None:
    """Each input may hold the tied tensor under one name or under both; the result is that of both everywhere."""
    own, peer, base = mixed(0), mixed(1), mixed(9)

    def merged(one: dict[str, Tensor], other: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
        more = {} if method == "average" else {"base": start}
        generator = torch.Generator().manual_seed(0)
        return merge_weights(
            *(one, [other], [0.5, 0.5]), method="average", combine=method, model=model, generator=generator, **more
        )

    whole = merged(own, peer, base)
    assert torch.equal(whole["head.weight"], whole["one.weight"])
    for gone in ("head.weight", "one.weight"):
        once = merged(own, {n: t for n, t in peer.items() if n != gone}, {n: t for n, t in base.items() if n != gone})
        assert all(torch.equal(once[name], whole[name]) for name in whole)
    if model is None:
        short = merged({n: t for n, t in own.items() if n != "head.weight"}, peer, base)
        assert all(torch.equal(short[name], whole[name]) for name in short)
        assert short.keys() == whole.keys() - {"head.weight"}


def test_names_that_are_tied_in_own_alone_are_merged_apart() -> None:
    """Values decide where there is no model: the peer's two tensors differ."""
    own, peer = mixed(0), mixed(1) | {"head.weight": torch.zeros(6, 6)}
    merged = merge_weights(own, [peer], [0.5, 0.5], method="average")
    assert torch.equal(merged["head.weight"], own["head.weight"] / 2)


def embedded(*, tied: bool, seed: int = 0) -> dict[str, Tensor]:
    """Weights of an embedding and its output layer, under both names: one tensor, or two."""
    generator = torch.Generator().manual_seed(seed)
    table, head = (torch.randn(5, 3, generator=generator) for _ in range(2))
    return {"embed.weight": table, "head.weight": table if tied else head}


def test_a_peer_that_stores_a_tied_weight_twice_is_merged_and_stays_tied() -> None:
    """Equal values are one tensor, also in memory of their own; the mean of both is under both names."""
    own, peer = embedded(tied=True), embedded(tied=True, seed=1)
    peer["head.weight"] = peer["head.weight"].clone()
    merged = merge_weights(own, [peer], [0.5, 0.5], method="average")
    assert torch.equal(merged["head.weight"], merged["embed.weight"])
    assert torch.allclose(merged["embed.weight"], (own["embed.weight"] + peer["embed.weight"]) / 2)


@pytest.mark.parametrize("shared", [True, False])
def test_a_peer_whose_tied_weights_differ_is_refused(shared: bool) -> None:
    """Own's tie, by memory or by the names of an embedding and its output layer, would end without a word."""
    own = embedded(tied=True)
    if not shared:
        own["head.weight"] = own["head.weight"].clone()
    with pytest.raises(PeerError, match=r"peer 0: tensors 'head\.weight' and 'embed\.weight' differ"):
        merge_weights(own, [embedded(tied=False, seed=1)], [0.5, 0.5], method="average")


def test_ties_that_the_model_has_hold_in_all_weights() -> None:
    """The second name's values would be dropped without a word, a peer's and own's."""
    other = mixed(1) | {"head.weight": torch.zeros(6, 6)}
    with pytest.raises(PeerError, match=r"tensors 'head\.weight' and 'one\.weight' differ"):
        merge_weights(mixed(0), [other], [0.5, 0.5], method="average", model=Mixed())
    with pytest.raises(MergeError, match=r"own weights: tensors 'head\.weight' and 'one\.weight' differ"):
        merge_weights(other, [mixed(0)], [0.5, 0.5], method="average", model=Mixed())


def test_layers_that_began_alike_are_merged_with_a_peer_whose_differ() -> None:
    """Copies of one layer have equal values at the start, and are two layers."""
    layer = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    own = {"layers.0.weight": layer, "layers.1.weight": layer.clone()}
    peer = {"layers.0.weight": 3 * layer, "layers.1.weight": -layer}
    merged = merge_weights(own, [peer], [0.5, 0.5], method="average")
    assert torch.allclose(merged["layers.0.weight"], 2 * layer)
    assert torch.allclose(merged["layers.1.weight"], torch.zeros(3, 3))
