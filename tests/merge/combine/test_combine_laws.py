"""Laws that every registered combine method keeps, whoever wrote it: the registry is gone through by name.

A new method is covered by being registered; what it needs beyond own, peers and mixing stands in `NEEDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dimat.config import MergeConfig, NamedConfig
from dimat.errors import ConfigError, DimatError, MergeError
from dimat.merge import MergeContext, Peer, merge, plan_merge
from dimat.merge.registry import combine_registry
from dimat.merge.shared_statistics import FISHER, GRAM, OWN
from dimat.registry import keywords
from dimat.symmetry import derive_symmetry

Model = dict[str, Tensor]


@dataclass(frozen=True)
class Needs:
    """What the laws hand to a method. `peers`: how many it merges; `equal`: options under which equal models merge to
    themselves, None where they do not (its docstring says why); `based`: options under which it needs a base;
    `rescales`: it scales all tensors by a factor that other tensors decide, so that none is on its own."""

    peers: int = 2
    equal: dict[str, Any] | None = field(default_factory=dict[str, Any])
    based: dict[str, Any] = field(default_factory=dict[str, Any])
    rescales: bool = False


NEEDS = {
    "slerp": Needs(peers=1),
    "nuslerp": Needs(peers=1, based={"deltas": True}),
    "ties": Needs(equal={"density": 1.0}),
    "breadcrumbs": Needs(equal={"density": 1.0}),
    "dare-linear": Needs(equal={"density": 1.0}),
    "dare-ties": Needs(equal={"density": 1.0}),
    "della": Needs(equal={"density": 1.0, "epsilon": 0.0}),
    "pcb-merging": Needs(equal=None, rescales=True),
    "emr": Needs(rescales=True),
    "opcm": Needs(rescales=True),
    "adamerging": Needs(equal=None, rescales=True),
    "self-positioning": Needs(equal=None, rescales=True),
}

METHODS = combine_registry.names()
WITH_BASE = [name for name in METHODS if "base" in keywords(combine_registry.get(name))]
RANDOM = [name for name in METHODS if "generator" in keywords(combine_registry.get(name))]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def needs(name: str) -> Needs:
    return NEEDS.get(name, Needs())


def model(seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Model:
    """Return weights of many shapes: matrices, a kernel, vectors, single elements, nothing, integers."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "fc.weight": (6, 8),
        "fc.bias": (6,),
        "conv.weight": (4, 3, 3, 3),
        "norm.weight": (5,),
        "one": (1,),
        "one_by_one": (1, 1),
        "scalar": (),
        "empty": (0, 3),
    }
    weights = {name: (torch.randn(shape, generator=g) * scale).to(dtype) for name, shape in shapes.items()}
    weights["count"] = torch.tensor(seed)
    weights["mask"] = torch.tensor([seed % 2 == 0, True])
    return weights


BASE = model(100)


def near(seed: int, dtype: torch.dtype = torch.float32, base: Model = BASE) -> Model:
    """Return a model that was trained from the base: BASE + small changes."""
    change = model(seed, torch.float32, 0.1)
    return {
        name: (base[name].float() + tensor).to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in change.items()
    }


def statistics(seed: int) -> Model:
    """Return what the methods that weigh by data ask for: Fisher diagonals and Gram matrices."""
    g = torch.Generator().manual_seed(seed)
    aux = {
        FISHER + name: torch.rand(tensor.shape, generator=g) + 0.1
        for name, tensor in BASE.items()
        if tensor.is_floating_point()
    }
    x = torch.randn(20, 8, generator=g)
    return aux | {GRAM + "fc.weight": x.T @ x / 20}


class Network(nn.Module):
    """A network whose state dict has the tensors of `model`, all of them in use; `tied`: with a second name for one.

    Its units are the four channels of the convolution, each of which the linear layer reads twice.
    """

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6)
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.ones(5))
        self.one = nn.Parameter(torch.ones(1))
        self.one_by_one = nn.Parameter(torch.ones(1, 1))
        self.scalar = nn.Parameter(torch.ones(()))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mask", torch.tensor([True, True]))
        if tied:
            self.head = nn.Linear(8, 6, bias=False)
            self.head.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x)).amax((2, 3))
        y = torch.cat([y, y], 1) + self.empty.sum()
        y = self.fc(y) + (self.head(y) if hasattr(self, "head") else 0)
        return torch.cat([y[:, :5] * self.norm.weight * self.one, y[:, 5:] * self.one_by_one], 1) + self.scalar


@cache
def network(tied: bool) -> MergeContext:
    """Return a network and data for it, which methods that look at activations or outputs ask for."""
    g = torch.Generator().manual_seed(5)
    data = [(torch.randn(16, 3, 6, 6, generator=g),) for _ in range(4)]
    built = Network(tied).eval()
    return MergeContext(built, derive_symmetry(built, data[0]), data)


def mixing(peers: int) -> list[float]:
    return [0.5, 0.5] if peers == 1 else [0.4, 0.35, 0.25]


def combine(
    name: str,
    own: Model,
    peers: list[Model],
    weights: list[float],
    options: Mapping[str, Any] | None = None,
    base: Model | None = BASE,
    aux: list[Model] | None = None,
) -> Model:
    context = {
        "base": base,
        "aux": aux or [statistics(k) for k in range(len(peers) + 1)],
        "generator": torch.Generator().manual_seed(7),
        "state": None,
    }
    if "data" in keywords(combine_registry.get(name)):
        context = network("head.weight" in own).offered() | context
    return dict(combine_registry.call(name, options or {}, own, peers, weights, **context))


def merged(name: str, own: Model, peers: list[Model], **more: Any) -> Model:
    """Merge with as many of the peers as the method takes."""
    count = needs(name).peers
    return combine(name, own, peers[:count], mixing(count), **more)


def assert_bits(got: Model, expected: Model) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
        if tensor.is_floating_point():
            assert torch.equal(torch.signbit(got[name]), torch.signbit(tensor)), name


def assert_close(got: Model, expected: Model, tolerance: float = 1e-6) -> None:
    """Compare with `tolerance` of each tensor's largest value; integers exactly."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert got[name].shape == tensor.shape
        if tensor.is_floating_point() and tensor.numel():
            error = (got[name].double() - tensor.double()).abs().max()
            assert error <= tolerance * max(tensor.double().abs().max().item(), 1e-30), f"{name}: {error}"
        else:
            assert torch.equal(got[name], tensor), name


def snapshot(weights: Model) -> Model:
    return {name: tensor.clone() for name, tensor in weights.items()}


@pytest.mark.parametrize("name", METHODS)
def test_weight_one_on_self_returns_own_bit_for_bit(name: str) -> None:
    """Signed zeros and subnormal numbers too; and in memory of its own."""
    own = near(0) | {"norm.weight": torch.tensor([-0.0, 0.0, 1e-45, -3.0, 1e30])}
    count = needs(name).peers
    for peers in ([], [near(k) for k in range(1, count + 1)]):
        result = combine(name, own, peers, [1.0] + [0.0] * len(peers))
        assert_bits(result, own)
        assert all(result[key].data_ptr() != t.data_ptr() for key, t in own.items() if t.numel())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_equal_models_merge_to_themselves(name: str, dtype: torch.dtype) -> None:
    """To 1e-6 of a tensor's largest value, half types to their last bit; sparsifying methods where nothing is cut."""
    options = needs(name).equal
    own, base = near(0, dtype), model(100, dtype)
    aux = [statistics(0)] * (needs(name).peers + 1)
    result = merged(name, own, [own, own], options=options, base=base, aux=aux)
    if options is None:  # no such option: what comes back is still of the same schema and finite
        assert_finite(result, own)
    else:
        assert_close(result, own, {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 1e-6))


@pytest.mark.parametrize("name", METHODS)
def test_zero_deltas_leave_the_base(name: str) -> None:
    """Nobody has trained: all are the base, and so is the result."""
    assert_close(merged(name, BASE, [BASE, BASE]), BASE)


@pytest.mark.parametrize("zero", ["own", "peers", "all"])
@pytest.mark.parametrize("name", METHODS)
def test_weights_that_are_all_zero_are_finite(name: str, zero: str) -> None:
    """A tensor without a direction or a scale divides nothing."""
    nothing = {key: torch.zeros_like(tensor) for key, tensor in BASE.items()}
    own = nothing if zero in ("own", "all") else near(0)
    peers = [nothing, nothing] if zero in ("peers", "all") else [near(1), near(2)]
    assert_finite(merged(name, own, peers, base=nothing), own)


def assert_finite(got: Model, like: Model) -> None:
    assert got.keys() == like.keys()
    for name, tensor in like.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert torch.isfinite(got[name]).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_types_stay_and_values_are_finite(name: str, dtype: torch.dtype) -> None:
    """Half types included; nothing that was handed in is changed; integers are own's."""
    own, peers, base = near(0, dtype), [near(1, dtype), near(2, dtype)], model(100, dtype)
    before = [snapshot(weights) for weights in (own, *peers, base)]
    result = merged(name, own, peers, base=base)
    assert_finite(result, own)
    assert torch.equal(result["count"], own["count"])
    assert torch.equal(result["mask"], own["mask"])
    for weights, copy in zip((own, *peers, base), before):
        assert_bits(weights, copy)


@pytest.mark.parametrize("name", METHODS)
def test_half_types_merge_as_their_values_do(name: str) -> None:
    """Reference: the same numbers in float32. Rounding is left to the end."""
    halves = [near(k, torch.bfloat16) for k in range(3)]
    base = model(100, torch.bfloat16)
    wide = [{n: t.float() if t.is_floating_point() else t for n, t in w.items()} for w in (*halves, base)]
    result = merged(name, halves[0], halves[1:], base=base)
    expected = merged(name, wide[0], wide[1:3], base=wide[3])
    assert_close(result, {n: t.to(result[n].dtype) for n, t in expected.items()}, 2**-7)


@pytest.mark.parametrize("name", METHODS)
def test_one_element_tensors_are_not_cut_away(name: str) -> None:
    """Reference: what all models have in common, which no threshold within such a tensor may take."""
    own = near(0) | {"one": torch.tensor([2.0]), "scalar": torch.tensor(-3.0), "one_by_one": torch.tensor([[0.5]])}
    peers = [near(k) | {key: own[key] for key in ("one", "scalar", "one_by_one")} for k in (1, 2)]
    options = needs(name).equal if name in RANDOM else {}  # at random anything may go
    result = merged(name, own, peers, options=options)
    assert_finite(result, own)
    if not needs(name).rescales:
        for key in ("one", "scalar", "one_by_one"):
            torch.testing.assert_close(result[key], own[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_non_contiguous_tensors_merge_as_contiguous_ones(name: str) -> None:
    """Transposed, strided and expanded memory holds the same numbers."""

    def strided(weights: Model) -> Model:
        rows = {n: t.mT.contiguous().mT for n, t in weights.items() if t.ndim > 1}
        gaps = {n: torch.stack([t, t], -1)[..., 0] for n, t in weights.items() if t.ndim == 1}
        return weights | rows | gaps

    models = [near(k) for k in range(3)]
    views = [strided(weights) for weights in (*models, BASE)]
    assert not views[0]["conv.weight"].is_contiguous()
    expected = merged(name, models[0], models[1:])
    assert_close(merged(name, views[0], views[1:3], base=views[3]), expected)


@pytest.mark.parametrize("name", METHODS)
def test_tied_tensors_stay_equal(name: str) -> None:
    """Two names of one tensor come out as the same numbers."""
    models = [near(k) for k in range(3)]
    tied = [weights | {"head.weight": weights["fc.weight"]} for weights in (*models, BASE)]
    aux = [statistics(k) for k in range(3)]
    aux = [
        a | {FISHER + "head.weight": a[FISHER + "fc.weight"], GRAM + "head.weight": a[GRAM + "fc.weight"]} for a in aux
    ]
    count = needs(name).peers
    options: dict[str, Any] = {"density": 1.0, "epsilon": 0.0} if name == "della" else {}
    if name.startswith("dare"):
        options = {"density": 1.0}  # draws go by name, so ties do not last where they are drawn
    result = combine(name, tied[0], tied[1 : count + 1], mixing(count), options, tied[3], aux[: count + 1])
    assert torch.equal(result["fc.weight"], result["head.weight"])


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_peers_does_not_matter(name: str) -> None:
    """Peers and their weights change places together; one of them agrees with own in places, so that scores tie."""
    if needs(name).peers < 2:
        pytest.skip("merges two models")
    own, one, two, three = (near(k) for k in range(4))
    two["fc.weight"] = own["fc.weight"].clone()
    peers, weights = [one, two, three], [0.4, 0.3, 0.2, 0.1]
    aux = [statistics(k) for k in range(4)]
    expected = combine(name, own, peers, weights, aux=aux)
    for order in ([1, 0, 2], [2, 1, 0], [1, 2, 0]):
        shuffled = [weights[0], *(weights[k + 1] for k in order)]
        result = combine(name, own, [peers[k] for k in order], shuffled, aux=[aux[0], *(aux[k + 1] for k in order)])
        assert_close(result, expected, 1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_peer_of_weight_zero_plays_no_part(name: str) -> None:
    """Whatever it holds: the result is as if it were not there."""
    count = needs(name).peers
    peers, wild = [near(k) for k in range(1, count + 1)], model(9, scale=50.0)
    expected = combine(name, near(0), peers, mixing(count))
    result = combine(name, near(0), [*peers, wild], [*mixing(count), 0.0])
    assert_close(result, expected)


@pytest.mark.parametrize("name", WITH_BASE)
def test_a_missing_base_is_an_error_that_says_what_to_give(name: str) -> None:
    """merge.base in a configuration."""
    with pytest.raises(MergeError, match=r"merge\.base"):
        merged(name, near(0), [near(1), near(2)], options=needs(name).based, base=None)


@pytest.mark.parametrize("name", WITH_BASE)
def test_a_base_of_another_architecture_is_an_error_that_names_the_tensor(name: str) -> None:
    """A missing tensor, and one of another shape."""
    missing = {key: tensor for key, tensor in BASE.items() if key != "conv.weight"}
    for base in (missing, BASE | {"conv.weight": torch.zeros(4, 3, 3, 2)}):
        with pytest.raises(MergeError, match=r"conv\.weight"):
            merged(name, near(0), [near(1), near(2)], options=needs(name).based, base=base)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", METHODS)
def test_values_that_are_not_finite_are_errors_or_refused(name: str, value: float) -> None:
    """Through the pipeline: a peer is refused and named, own weights are an error, and nothing is changed."""
    plan = plan_merge(MergeConfig(method="average", combine=NamedConfig(name=name)))
    own, good, bad = near(0), near(1), near(2)
    bad["conv.weight"][0, 0, 0, 0] = value
    aux = {OWN: statistics(0), "good": statistics(1), "bad": statistics(2)}
    seen = network(False)
    context = MergeContext(
        seen.model, seen.spec, seen.data, base=BASE, aux=aux, generator=torch.Generator().manual_seed(0)
    )
    peers = [Peer("good", good, 0.3), Peer("bad", bad, 0.2)]
    with pytest.raises(DimatError, match=r"bad: tensor 'conv\.weight'"):
        merge(own, 0.5, peers, plan, context, refuse=False)
    outcome = merge(own, 0.5, peers, plan, context)
    assert list(outcome.refused) == ["bad"]
    assert outcome.own_weight == pytest.approx(0.7)
    assert_finite(outcome.weights, own)
    with pytest.raises(MergeError, match="own weights"):
        merge(bad, 0.7, peers[:1], plan, context)


@pytest.mark.parametrize("name", RANDOM)
def test_draws_follow_the_generator(name: str) -> None:
    """Equal seeds give equal bits, other seeds do not; without a generator the error says so."""
    own, peers = near(0), [near(1), near(2)]
    first, second = (merged(name, own, peers) for _ in range(2))
    assert_bits(first, second)
    other = combine_registry.call(
        name, {}, own, peers, mixing(2), base=BASE, generator=torch.Generator().manual_seed(8)
    )
    assert not torch.equal(first["fc.weight"], other["fc.weight"])
    with pytest.raises(MergeError, match="generator="):
        dict(combine_registry.call(name, {}, own, peers, mixing(2), base=BASE, generator=None))


def test_options_are_those_of_a_configuration() -> None:
    """As TOML or JSON has them: whole numbers for floats, tables, lists; what does not fit names the option."""
    good: list[tuple[str, dict[str, Any]]] = [
        ("ties", {"density": 1, "trim": "vector", "merge_func": "max", "weights": [1, 0.5]}),
        ("layer-swap", {"layers": {"fc*": 1, "head.*": "average"}, "rest": 0}),
        ("slerp", {"t": 0.3}),
        ("model-stock", {"filter_wise": True}),
    ]
    for name, options in good:
        combine_registry.check(name, options)
    bad: list[tuple[str, dict[str, Any]]] = [
        ("ties", {"density": 0.0}),
        ("ties", {"trim": "model"}),
        ("task-arithmetic", {"weights": []}),
        ("layer-swap", {"layers": {"fc*": -1}}),
        ("consensus", {"k": 1.5}),
        ("slerp", {"t": 1.1}),
    ]
    for name, options in bad:
        with pytest.raises(ConfigError, match=next(iter(options))):
            combine_registry.check(name, options)
