"""The whole pipeline: exactness rules, refusals, and what must not change."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from dimat import align_weights, merge_weights
from dimat.config import MergeConfig
from dimat.errors import ConfigError, DataError, MergeError, PeerError, SymmetryError
from dimat.merge import MergeContext, MergeOutcome, Peer, adopt, merge, plan_merge
from dimat.symmetry import SymmetrySpec, derive_symmetry, permute_weights, random_permutations
from tests.merge.networks import Vgg, randomise


@dataclass
class Setting:
    model: nn.Module
    spec: SymmetrySpec
    data: list[tuple[Tensor, ...]]

    def context(self, **more: Any) -> MergeContext:
        return MergeContext(self.model, self.spec, self.data, **more)


@cache
def setting() -> Setting:
    g = torch.Generator().manual_seed(0)
    data: list[tuple[Tensor, ...]] = [(torch.randn(32, 3, 12, 12, generator=g),) for _ in range(3)]
    model = Vgg([8, "M", 16, 12])
    return Setting(model, derive_symmetry(model, data[0]), data)


def state(seed: int) -> dict[str, Tensor]:
    """Return random weights with running statistics that fit them."""
    s = setting()
    model = randomise(copy.deepcopy(s.model), seed).train()
    with torch.no_grad():
        for inputs in s.data * 5:
            model(*inputs)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def permuted(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    spec = setting().spec
    return permute_weights(weights, spec, random_permutations(spec, torch.Generator().manual_seed(seed)))


def run(own: dict[str, Tensor], peers: list[Peer], method: str = "dimat", **config: Any) -> MergeOutcome:
    plan = plan_merge(MergeConfig.model_validate({"method": method, **config}))
    return merge(own, 1 - sum(p.weight for p in peers), peers, plan, setting().context())


def assert_close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], atol: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_weight_one_on_self_returns_own_bit_for_bit() -> None:
    """Exactness rule. No repair either: nothing was averaged."""
    own = state(0)
    for peers in ([], [Peer("b", state(1), 0.0)]):
        outcome = run(own, peers)
        assert_bits(outcome.weights, own)
        assert outcome.own_weight == 1.0
        assert outcome.images == {}
        assert all(outcome.weights[n].data_ptr() != t.data_ptr() for n, t in own.items())


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), weight=st.floats(0.05, 1.0))
def test_a_permuted_copy_of_self_merges_to_self(seed: int, weight: float) -> None:
    """Exactness rule and invariant 1: to 1e-6, whatever the permutation and the mixing weight."""
    own = state(0)
    outcome = run(own, [Peer("b", permuted(own, seed), weight)], repair="none")
    assert_close(outcome.weights, own)
    assert outcome.moved["b"] > 0.5


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_merge_does_not_depend_on_a_neighbours_order_of_units(seed: int) -> None:
    """Invariant 3: align undoes any permutation of a neighbour."""
    own, peer = state(0), state(1)
    expected = run(own, [Peer("b", peer, 0.5)], repair="none").weights
    assert_close(run(own, [Peer("b", permuted(peer, seed), 0.5)], repair="none").weights, expected)


def test_permuting_own_permutes_the_merge() -> None:
    """Invariant 3 for self: the result is in own's order of units, repair included."""
    own, peer = state(0), state(1)
    merged = run(own, [Peer("b", peer, 0.4)]).weights
    assert_close(run(permuted(own, 3), [Peer("b", peer, 0.4)]).weights, permuted(merged, 3), atol=1e-5)


def test_identical_models_and_several_peers() -> None:
    """All-equal models give own back, here four of them with weights that do not round."""
    own = state(0)
    peers = [Peer(str(k), permuted(own, k) if k else own, 0.3) for k in range(3)]
    assert_close(run(own, peers, repair="none").weights, own)


def test_average_is_the_weighted_sum_of_state_dicts() -> None:
    """Reference: the paper's baseline WA, θ = Σ w_k θ_k on whole state dicts; integers are own's."""
    states = [state(k) for k in range(3)]
    states[1]["features.1.num_batches_tracked"] += 5
    weights = run(states[0], [Peer("b", states[1], 0.3), Peer("c", states[2], 0.2)], "average").weights
    for name, tensor in states[0].items():
        expected = tensor
        if tensor.is_floating_point():
            expected = 0.5 * tensor + 0.3 * states[1][name] + 0.2 * states[2][name]
        torch.testing.assert_close(weights[name], expected, rtol=1e-5, atol=1e-6)


def test_peers_in_our_basis_are_not_aligned() -> None:
    """Basis gossip: such a peer is averaged as it is, and another beside it is aligned."""
    own, b, c = state(0), permuted(state(0), 1), permuted(state(0), 2)
    outcome = run(own, [Peer("b", b, 0.5, same_basis=True), Peer("c", c, 0.25)], repair="none")
    assert outcome.permutations.keys() == outcome.moved.keys() == {"c"}
    for name in ("features.0.weight", "classifier.weight"):
        torch.testing.assert_close(outcome.weights[name], 0.5 * own[name] + 0.5 * b[name], rtol=0, atol=1e-6)


def test_merging_reports_what_it_did() -> None:
    """Weights, share of moved units, images and CPU time by stage."""
    outcome = run(state(0), [Peer("b", permuted(state(0), 1), 0.5)])
    assert outcome.mixing == {"b": 0.5}
    assert outcome.own_weight == 0.5
    assert outcome.accepted == 1.0
    assert outcome.refused == {}
    assert outcome.images["repair"] == 96
    assert 0 < outcome.images["align"] <= 96
    assert {"screen", "align", "combine", "repair", "accept", "align.forward"} <= outcome.cpu_s.keys()


def broken(weights: dict[str, Tensor], **change: Tensor) -> dict[str, Tensor]:
    return weights | {name.replace("__", "."): tensor for name, tensor in change.items()}


def test_refused_peers_leave_their_weight_to_self() -> None:
    """A NaN, a wrong shape and a huge norm are refused with names; the rest is merged as if they were absent."""
    own, good = state(0), state(1)
    peers = [
        Peer("nan", broken(good, classifier__bias=torch.full((10,), torch.nan)), 0.2),
        Peer("shape", broken(good, classifier__bias=torch.zeros(9)), 0.1),
        Peer("huge", {n: t * 1e4 if t.is_floating_point() else t for n, t in good.items()}, 0.1),
        Peer("good", good, 0.3),
    ]
    outcome = run(own, peers)
    assert outcome.refused.keys() == {"nan", "shape", "huge"}
    assert all(name in reason for name, reason in outcome.refused.items())
    assert "'classifier.bias'" in outcome.refused["nan"]
    assert outcome.mixing == {"good": 0.3}
    assert outcome.own_weight == pytest.approx(0.7)
    assert_bits(outcome.weights, run(own, [Peer("good", good, 0.3)]).weights)


def test_only_refused_peers_leave_own_weights() -> None:
    """Bit for bit, with all of the weight."""
    own = state(0)
    outcome = run(own, [Peer("b", broken(state(1), classifier__bias=torch.full((10,), torch.inf)), 0.5)])
    assert_bits(outcome.weights, own)
    assert outcome.own_weight == 1.0


def test_a_damaged_file_is_refused_not_merged(tmp_path: Path) -> None:
    """A file of another model, opened lazily."""
    save_file({"x": torch.ones(1)}, tmp_path / "b.safetensors")
    from dimat.merge import open_weights

    outcome = run(state(0), [Peer("b", open_weights(tmp_path / "b.safetensors"), 0.5)])
    assert "is missing" in outcome.refused["b"]


@pytest.mark.parametrize("weights", [[0.5, 0.4], [0.5, 0.6], [1.5, -0.5], [float("nan"), 0.5]])
def test_mixing_weights_that_are_no_convex_combination_are_refused(weights: list[float]) -> None:
    """Invariant 2. (The published program merged with rows that sum to 2/3.)"""
    with pytest.raises(MergeError, match="mixing weights must"):
        merge(state(0), weights[0], [Peer("b", state(1), weights[1])], plan_merge(MergeConfig()), setting().context())


def test_own_weights_that_cannot_be_merged_are_an_error() -> None:
    """Not finite, or another model's."""
    own = state(0)
    with pytest.raises(MergeError, match=r"own weights: tensor 'classifier\.bias'"):
        run(broken(own, classifier__bias=torch.full((10,), torch.nan)), [Peer("b", own, 0.5)])
    with pytest.raises(MergeError, match="'extra' is not in the model"):
        run(own | {"extra": torch.ones(1)}, [Peer("b", own, 0.5)])
    with pytest.raises(MergeError, match=r"'classifier\.bias' is \[9\], in the model \[10\]"):
        run(broken(own, classifier__bias=torch.zeros(9)), [Peer("b", own, 0.5)])


def test_nothing_that_was_handed_in_changes() -> None:
    """Model (weights, modes, momenta), own and peers' tensors, and the global random state are as before."""
    s = setting()
    model = copy.deepcopy(s.model).train()
    model.get_submodule("features.1").momentum = 0.3  # type: ignore[assignment]
    before = copy.deepcopy(model)
    own, peer = state(0), state(1)
    kept = copy.deepcopy((own, peer))
    random = torch.random.get_rng_state()
    context = MergeContext(model, derive_symmetry(model, s.data[0]), s.data)
    merge(own, 0.5, [Peer("b", peer, 0.5)], plan_merge(MergeConfig()), context)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert_bits(own, kept[0])
    assert_bits(peer, kept[1])
    assert_bits(model.state_dict(), before.state_dict())
    for (name, now), (_, then) in zip(model.named_modules(), before.named_modules()):
        assert now.training == then.training, name
        assert getattr(now, "momentum", None) == getattr(then, "momentum", None), name


def test_merging_twice_gives_the_same() -> None:
    """Positions are drawn from a fixed seed where no generator is given."""
    outcomes = [run(state(0), [Peer("b", state(1), 0.5)]) for _ in range(2)]
    assert_bits(outcomes[0].weights, outcomes[1].weights)


def test_repair_reestimates_the_merged_model() -> None:
    """Reference: the repaired merge normalises its own activations: first layer's statistics are its inputs'."""
    outcome = run(
        state(0), [Peer("b", state(1), 0.5)], repair={"name": "batchnorm", "options": {"stable_within": None}}
    )
    x = torch.cat([inputs[0] for inputs in setting().data])
    w = outcome.weights
    inputs = nn.functional.conv2d(x, w["features.0.weight"], w["features.0.bias"], padding=1)
    torch.testing.assert_close(w["features.1.running_mean"], inputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        w["features.1.running_var"], inputs.transpose(0, 1).flatten(1).var(1), rtol=1e-4, atol=1e-5
    )


def test_accept_backs_off_on_a_worse_score() -> None:
    """The score likes own weights alone: they come back bit for bit, with a note."""
    own = state(0)
    context = setting().context(score=lambda w: float(torch.equal(w["classifier.bias"], own["classifier.bias"])))
    plan = plan_merge(MergeConfig.model_validate({"accept": "no-worse"}))
    outcome = merge(own, 0.5, [Peer("b", state(1), 0.5)], plan, context)
    assert_bits(outcome.weights, own)
    assert outcome.accepted == 0.0
    assert any("kept own weights" in note for note in outcome.notes)


@pytest.mark.parametrize("spec", [None, SymmetrySpec((), ())])
def test_without_symmetry_groups_weights_are_averaged_as_they_are(spec: SymmetrySpec | None) -> None:
    """With a note."""
    s = setting()
    own, peer = state(0), state(1)
    plan = plan_merge(MergeConfig.model_validate({"repair": "none"}))
    outcome = merge(own, 0.5, [Peer("b", peer, 0.5)], plan, MergeContext(s.model, spec, s.data))
    assert_bits(outcome.weights, run(own, [Peer("b", peer, 0.5)], "average").weights)
    assert "without alignment" in outcome.notes[0]


def test_missing_data_is_an_error() -> None:
    """Aligning and re-estimating need inputs."""
    s = setting()
    for config, stage in (({"repair": "none"}, "aligning"), ({"align": "none"}, "re-estimating")):
        plan = plan_merge(MergeConfig.model_validate(config))
        for data in (None, []):
            with pytest.raises(MergeError, match=f"{stage}|empty"):
                merge(state(0), 0.5, [Peer("b", state(1), 0.5)], plan, MergeContext(s.model, s.spec, data))


def test_adopting_a_basis_permutes_own_into_the_peers_order() -> None:
    """Own, permuted by `adopt`, is the permuted copy that the peer holds."""
    own = state(0)
    peer = Peer("b", permuted(own, 5), 0.5)
    permutations = adopt(own, peer, plan_merge(MergeConfig()), setting().context())
    assert_bits(permute_weights(own, setting().spec, permutations), peer.weights)
    assert adopt(own, peer, plan_merge(MergeConfig(method="average")), setting().context()) == {}


def test_adopting_from_a_broken_peer_is_an_error() -> None:
    """Own basis stays."""
    peer = Peer("lab-b", broken(state(1), classifier__bias=torch.full((10,), torch.nan)), 0.5)
    with pytest.raises(PeerError, match=r"lab-b: tensor 'classifier\.bias'"):
        adopt(state(0), peer, plan_merge(MergeConfig()), setting().context())


def test_the_model_is_traced_once_per_context() -> None:
    """Tracing takes seconds: the observer is kept from merge to merge."""
    context = setting().context()
    plan = plan_merge(MergeConfig())
    for _ in range(2):
        merge(state(0), 0.5, [Peer("b", state(1), 0.5)], plan, context)
        (observer,) = context.observer_cache.values()
    assert context.observer((setting().data[0][0],)) is observer


class TestMergeWeights:
    """The public function."""

    def test_files_and_dictionaries_give_the_same(self, tmp_path: Path) -> None:
        """Reference: the same call on state dicts; the spec is derived where none is handed in."""
        s, own, peer = setting(), state(0), state(1)
        save_file(own, tmp_path / "own.safetensors")
        save_file(peer, tmp_path / "peer.safetensors")
        from_files = merge_weights(
            tmp_path / "own.safetensors", [str(tmp_path / "peer.safetensors")], [0.5, 0.5], model=s.model, data=s.data
        )
        assert_bits(from_files, merge_weights(own, [peer], [0.5, 0.5], model=s.model, data=s.data, spec=s.spec))

    def test_data_may_be_tensors_tuples_or_read_once(self) -> None:
        """A list of tensors, of tuples, and a generator are the same data."""
        s, own, peer = setting(), state(0), state(1)
        forms = [s.data, [x for (x,) in s.data], (x for (x,) in s.data)]
        merged = [merge_weights(own, [peer], [0.5, 0.5], model=s.model, data=d, spec=s.spec) for d in forms]
        assert_bits(merged[0], merged[1])
        assert_bits(merged[0], merged[2])

    def test_one_tensor_is_one_batch(self) -> None:
        """Not a sequence of images."""
        s, own, peer = setting(), state(0), state(1)
        x = s.data[0][0]
        merged = [merge_weights(own, [peer], [0.5, 0.5], model=s.model, data=d, spec=s.spec) for d in (x, [x])]
        assert_bits(*merged)

    def test_average_needs_neither_model_nor_data(self) -> None:
        """State dicts of anything, one-element tensors too."""
        merged = merge_weights({"x": torch.tensor([1.0])}, [{"x": torch.tensor([3.0])}], [0.25, 0.75], "average")
        assert float(merged["x"]) == 2.5

    def test_a_nan_names_the_peer_and_the_tensor(self, tmp_path: Path) -> None:
        """By index, and by path for files; own is untouched."""
        own = state(0)
        bad = broken(state(1), classifier__bias=torch.full((10,), torch.nan))
        with pytest.raises(PeerError, match=r"peer 1: tensor 'classifier\.bias' holds 10"):
            merge_weights(own, [state(1), bad], [0.5, 0.25, 0.25], "average")
        save_file(bad, tmp_path / "bad.safetensors")
        with pytest.raises(PeerError, match=r"peer 0 \(.*bad\.safetensors\): tensor"):
            merge_weights(own, [tmp_path / "bad.safetensors"], [0.5, 0.5], "average")
        assert_bits(own, state(0))

    def test_options_reach_every_stage_that_has_them(self) -> None:
        """`repair` replaces a stage; `max_images` is an option of both align and repair; `screen` of the screen."""
        s, own, peer = setting(), state(0), state(1)
        call = {"model": s.model, "data": s.data, "spec": s.spec}
        few = merge_weights(own, [peer], [0.5, 0.5], **call, max_images=40)
        explicit = merge_weights(
            own,
            [peer],
            [0.5, 0.5],
            **call,
            align={"name": "activations", "options": {"max_images": 40}},
            repair={"name": "batchnorm", "options": {"max_images": 40}},
        )
        assert_bits(few, explicit)
        with pytest.raises(PeerError, match="exceed"):
            merge_weights(own, [peer], [0.5, 0.5], **call, screen={"max_norm_ratio": 1e-3})

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"mixing": [0.5, 0.25]}, MergeError, "sum to 1"),
            ({"mixing": [0.5, 0.25, 0.25]}, MergeError, "1 peers need 2 mixing weights"),
            ({"mixing": [-0.5, 1.5]}, MergeError, "not negative"),
            ({"method": "dimatt"}, ConfigError, "did you mean 'dimat'"),
            ({"max_image": 3}, ConfigError, "did you mean 'max_images'"),
            ({"repair": "batchnrm"}, ConfigError, "did you mean 'batchnorm'"),
            ({"accept": "no-worse"}, MergeError, "needs a score"),
            ({"model": None}, MergeError, "needs model= and data="),
            ({"data": None}, MergeError, "needs model= and data="),
            ({"peers": ["/nowhere.safetensors"]}, DataError, "nowhere"),
            ({"points": {"nothing": ["relu"]}}, SymmetryError, "no symmetry group 'nothing'"),
        ],
    )
    def test_errors(self, change: dict[str, Any], error: type[Exception], message: str) -> None:
        """Each fault has its class and says what is wrong."""
        s = setting()
        call: dict[str, Any] = {"own": state(0), "peers": [state(1)], "mixing": [0.5, 0.5], "model": s.model}
        with pytest.raises(error, match=message):
            merge_weights(**call | {"data": s.data} | change)


def test_align_weights_checks_its_options_and_points() -> None:
    """Unknown option, group and node are errors with a suggestion."""
    s = setting()
    group = s.spec.groups[0]
    with pytest.raises(ConfigError, match="did you mean 'positions'"):
        align_weights(s.model, state(0), state(1), s.spec, s.data, position=None)
    with pytest.raises(SymmetryError, match="cannot be observed at node"):
        align_weights(s.model, state(0), state(1), s.spec, s.data, points={group.id: ["nowhere"]})
    assert align_weights(s.model, state(0), state(1), s.spec, s.data, "none") == {}


def test_alignment_stops_when_it_is_stable_and_not_before() -> None:
    """A permuted copy correlates perfectly: the assignment stands at 64, 128 and 256 images. Without `stable_within`
    all images are taken, and `max_images` caps them."""
    s, own = setting(), state(0)
    peers = [Peer("b", permuted(own, 1), 0.5)]
    many = s.data * 10

    def images(**options: Any) -> int:
        align = {"name": "activations", "options": options}
        plan = plan_merge(MergeConfig.model_validate({"align": align, "repair": "none"}))
        return merge(own, 0.5, peers, plan, MergeContext(s.model, s.spec, many)).images["align"]

    assert images() == 256
    assert images(stable_within=None) == 960
    assert images(max_images=100) == 100
