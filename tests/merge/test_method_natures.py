"""Every combine method of the registry × every nature of an entry: what no method may decide comes out right.

Reference: the definitions in `dimat/merge/natures.py`. A method that is added is tested here by being registered.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

from dimat import merge_weights
from dimat.config import MergeConfig
from dimat.errors import MergeError, PeerError
from dimat.merge import MergeContext, Peer, merge, plan_merge
from dimat.merge.registry import combine_registry

FACTORS = {"lora-concat", "lora-lego", "lora-svd"}


class Whole(nn.Module):
    """Parameters, a mean, a variance, counts, masks of ±∞, u and v, codes with a scale, a tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.head = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6, bias=False)
        self.head.weight = self.one.weight
        self.spectral = spectral_norm(nn.Linear(6, 4))
        self.register_buffer("mask", torch.full((6, 6), -torch.inf).triu(1))
        self.register_buffer("ceiling", torch.tensor([torch.inf, torch.inf, 1.0]))
        self.register_buffer("code_table", torch.randint(-8, 8, (4, 3), dtype=torch.int8))
        self.register_buffer("code_table_scale", torch.rand(4) + 0.1)
        self.register_buffer("step", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.spectral(self.head(self.norm(self.one(x))).relu())


def model_of(seed: int) -> Whole:
    torch.manual_seed(seed)
    model = Whole()
    for _ in range(3):
        model(torch.randn(32, 6) * (1 + seed))
    model.get_buffer("step").add_(seed + 1)
    return model.eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def merged_by(method: str, own: dict[str, Tensor], peer: dict[str, Tensor], **more: Any) -> dict[str, Tensor]:
    """Merge by a method with all that it may ask for."""
    floats = {name: t for name, t in own.items() if t.is_floating_point()}
    aux = {f"fisher.{name}": torch.rand(t.shape) for name, t in floats.items()}
    aux |= {f"gram.{name}": torch.eye(t.shape[1]) for name, t in floats.items() if t.ndim == 2}
    context: dict[str, Any] = {"model": Whole(), "generator": torch.Generator().manual_seed(0)}
    bound = combine_registry.bind(method, {})
    if "base" in bound.asks:
        context["base"] = state(model_of(9))
    if "aux" in bound.asks:
        context["aux"] = [aux, aux]
    if "data" in bound.asks:
        context["data"] = torch.randn(64, 6)
    return merge_weights(own, [peer], [0.5, 0.5], method="average", combine=method, **(context | more))


@pytest.mark.parametrize("method", sorted({*combine_registry.names()} - FACTORS))
def test_every_method_is_true_to_every_nature(method: str) -> None:
    """Constants of ±∞ and codes with their scales stay bit for bit, counts stay own's, variances are not negative, the
    two names are equal, and u, v are the singular vectors of the merged weight (by `torch.linalg.svd`)."""
    own, peer = state(model_of(0)), state(model_of(1))
    for name in ("code_table", "code_table_scale"):
        peer[name] = own[name].clone()
    own["norm.running_var"][:3], peer["norm.running_var"][3:] = 0.0, 1e-9
    merged = merged_by(method, own, peer)
    for name in ("mask", "ceiling", "code_table", "code_table_scale"):
        assert torch.equal(merged[name], own[name]), name
    for name in ("step", "norm.num_batches_tracked"):
        assert merged[name] == own[name], name
    assert (merged["norm.running_var"] >= 0).all()
    assert torch.equal(merged["head.weight"], merged["one.weight"])
    weight, u, v = (merged[f"spectral.parametrizations.weight.{part}"] for part in ("original", "0._u", "0._v"))
    assert float(u @ weight @ v) == pytest.approx(float(torch.linalg.svdvals(weight)[0]), rel=1e-4)
    assert all(t.isfinite().all() for name, t in merged.items() if name not in ("mask", "ceiling"))


def overflowing() -> tuple[dict[str, Tensor], Peer, dict[str, Any]]:
    """float16 that overflows where a difference is scaled: own, a peer, and the merge's settings."""
    own = {"w": torch.tensor([40000.0, 1.0]).half()}
    peer = Peer("lab-b", {"w": torch.tensor([40000.0, 2.0]).half()}, 0.5)
    return own, peer, {"method": "average", "combine": {"name": "task-arithmetic", "options": {"scaling": 3.0}}}


def test_a_merge_that_is_not_finite_is_kept_where_that_is_wanted() -> None:
    """`merge.keep_not_finite`: the merge stands, a warning tells of it, and the next merge goes on from there."""
    own, peer, settings = overflowing()
    plan = plan_merge(MergeConfig.model_validate({**settings, "keep_not_finite": True}))
    context = MergeContext(base={"w": torch.zeros(2).half()})
    outcome = merge(own, 0.5, [peer], plan, context)
    assert outcome.accepted == 1
    assert outcome.weights["w"].tolist() == [float("inf"), 4.5]
    assert outcome.notes == (
        "warning: the merge's tensor 'w' holds 1 values that are not finite: the merge is kept, since "
        "merge.keep_not_finite is set",
    )
    assert merge(outcome.weights, 0.5, [peer], plan, context).own_weight == 0.5


class Counting(nn.Module):
    """Buffers that are no parameters, as codebooks, normalisers of observations and rotary embeddings have them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.one = nn.Linear(6, 6)
        for name, low in (("cluster_size", 0.0), ("histogram", 0.0), ("levels", 0.0), ("obs_std", 1e-3)):
            self.register_buffer(name, torch.rand(40, generator=g) + low)
        self.register_buffer("obs_mean", torch.randn(40, generator=g))
        self.register_buffer("freqs_cis", torch.polar(torch.ones(4), torch.arange(4.0)))

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x)


@pytest.mark.parametrize("method", sorted({*combine_registry.names()} - FACTORS))
@pytest.mark.parametrize("known", [True, False])
def test_no_method_makes_counts_and_spreads_negative(method: str, known: bool) -> None:
    """What no model has below 0 is not below 0 afterwards, with the modules at hand and by names alone; a complex
    constant stays bit for bit."""
    own, peer, base = (state(Counting(seed)) for seed in (0, 1, 2))
    bound = combine_registry.bind(method, {})
    if not known and {"model", "data"} & {*bound.asks}:
        pytest.skip("runs the model")
    context: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "model": Counting(0) if known else None}
    real = {name: t for name, t in own.items() if t.is_floating_point()}
    aux = {f"fisher.{n}": torch.rand(t.shape) for n, t in real.items()} | {"gram.one.weight": torch.eye(6)}
    context |= {"base": base} if "base" in bound.asks else {}
    context |= {"aux": [aux, aux]} if "aux" in bound.asks else {}
    context |= {"data": torch.randn(64, 6)} if "data" in bound.asks else {}
    merged = merge_weights(own, [peer], [0.5, 0.5], method="average", combine=method, **context)
    for name in ("cluster_size", "histogram", "obs_std", *(["levels"] if known else [])):
        assert (merged[name] >= 0).all(), name
    assert torch.equal(merged["freqs_cis"], own["freqs_cis"])


@pytest.mark.parametrize("name", ["obs_rms.var", "obs_std", "population_variance", "running_m2", "log_std"])
def test_a_peer_with_a_negative_spread_is_refused(name: str) -> None:
    """By its own name, or by the mean beside it; the logarithm of a spread may be negative."""
    own = {name: torch.ones(3), "obs_rms.mean": torch.zeros(3), "obs_mean": torch.zeros(3), "log_mean": torch.zeros(3)}
    peer = own | {name: -torch.ones(3)}
    if name == "log_std":
        assert merge_weights(own, [peer], [0.5, 0.5], method="average")[name].tolist() == [0, 0, 0]
        return
    with pytest.raises(PeerError, match=f"tensor '{name}' is a variance and holds 3 values below 0"):
        merge_weights(own, [peer], [0.5, 0.5], method="average")


@pytest.mark.parametrize("method", sorted({*combine_registry.names()} - FACTORS - {"regmean"}))
def test_every_method_reads_8_bit_floats(method: str) -> None:
    """float8 weights without a scale are numbers like others; equal models stay as they are."""
    bound = combine_registry.bind(method, {})
    if {"model", "data"} & {*bound.asks}:
        pytest.skip("runs the model")
    generator = torch.Generator().manual_seed(0)
    own, peer = ({"w": torch.randn(8, 8, generator=generator).to(torch.float8_e4m3fn)} for _ in range(2))
    aux = {"fisher.w": torch.ones(8, 8)}
    context: dict[str, Any] = {"generator": generator}
    context |= {"base": {"w": torch.zeros(8, 8).to(torch.float8_e4m3fn)}} if "base" in bound.asks else {}
    context |= {"aux": [aux, aux]} if "aux" in bound.asks else {}
    merged = merge_weights(own, [peer], [0.5, 0.5], method="average", combine=method, **context)
    assert merged["w"].dtype == torch.float8_e4m3fn
    assert merged["w"].float().isfinite().all()
    if method == "average":
        mean = (own["w"].float() + peer["w"].float()) / 2
        assert torch.equal(merged["w"].float(), mean.to(torch.float8_e4m3fn).float())


def test_a_frame_is_shared() -> None:
    """An orthogonal weight is base · f(original): with another base the merge would not be orthogonal, and nobody would
    be told; with the same one it is. Reference: W Wᵀ = 1."""
    models: list[Any] = [orthogonal(nn.Linear(5, 5)) for _ in range(2)]
    own, peer = (state(model) for model in models)
    with pytest.raises(PeerError, match=r"weight.0.base' is what another one is written in, and differs from ours"):
        merge_weights(own, [peer], [0.5, 0.5], method="average", model=models[0])
    peer["parametrizations.weight.0.base"] = own["parametrizations.weight.0.base"].clone()
    models[0].load_state_dict(merge_weights(own, [peer], [0.5, 0.5], method="average", model=models[0]))
    weight = models[0].weight.detach()
    torch.testing.assert_close(weight @ weight.T, torch.eye(5))


def test_views_of_complex_weights_are_read() -> None:
    """A conjugate is a view in torch. Reference: the mean of the values."""
    own, peer = (torch.randn(3, 4, dtype=torch.complex64) for _ in range(2))
    merged = merge_weights({"w": own.conj()}, [{"w": peer.conj()}], [0.5, 0.5], method="average")
    torch.testing.assert_close(merged["w"], ((own + peer) / 2).conj().resolve_conj())


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"w": torch.ones(2), "_extra_state": {"scale": 1}}, "'_extra_state' is a dict, no tensor; give it as one, or"),
        ({"state_dict": {"w": torch.ones(2)}}, "'state_dict' is a dict, no tensor; hand that in, if it is the model's"),
        ({0: torch.ones(2)}, "the name 0 is a int"),
        (nn.Linear(2, 2), r"weights are a Linear; give a state dict, e.g. model.state_dict\(\)"),
    ],
)
def test_what_is_no_state_dict_is_told(own: Any, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        merge_weights(own, [own], [0.5, 0.5], method="average")


def test_a_peer_alone_is_no_list_of_peers() -> None:
    own = {"w": torch.ones(2)}
    with pytest.raises(MergeError, match="peers is a list of weights"):
        merge_weights(own, own, [0.5, 0.5], method="average")  # pyright: ignore[reportArgumentType]
