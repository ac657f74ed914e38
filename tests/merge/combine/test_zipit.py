"""ZipIt: the authors' matrices, its definition written out, and what it promises on networks of all kinds.

Reference of the golden vectors: ZipIt's program (arXiv 2305.03053) on two small VGGs, `tests/golden/zipit_vgg.*`. Its
rows are divided by count + 1e-5, ours by count.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from dimat import align_weights, derive_symmetry, merge_weights, permute_weights
from dimat.config import MergeConfig, NamedConfig
from dimat.errors import MergeError
from dimat.merge import MergeContext, needs_symmetry, plan_merge
from dimat.merge.combine.average import average
from dimat.merge.matching.units import Taken, merge_units, taken_axes
from dimat.merge.matching.zip_units import keep_places, zip_units
from dimat.merge.weight_views import axes_by_name
from dimat.symmetry import AxisRef, Factor, random_permutations
from dimat.symmetry.permute import layout_length, pieces
from tests.merge.methods import assert_same_bits, combine, worst
from tests.merge.networks import LeNet, ResNet, UNet, Vgg, mlp, randomise
from tests.merge.zip_reference import correlation_of, zip_matrices
from tests.symmetry.zoo import Grouped, TiedText, Volume

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "zipit_vgg.safetensors")
NODES = sorted(name.removeprefix("cov.") for name in GOLDEN if name.startswith("cov."))
Model = dict[str, Tensor]


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize(("a", "b"), [(0.0001, 0.075), (0.3, 0.125)])
def test_golden(a: float, b: float, node: str) -> None:
    """Which units merge, and with what weights: exactly, once the reference's 1e-5 is put in."""
    merge, unmerge = zip_matrices(GOLDEN[f"cov.{node}"], 2, a, b)
    assert torch.equal(unmerge, GOLDEN[f"a{a}_b{b}.unmerge.{node}"])
    count = unmerge.sum(0)[:, None]
    torch.testing.assert_close(merge * count / (count + 1e-5), GOLDEN[f"a{a}_b{b}.merge.{node}"], rtol=1e-6, atol=0)
    torch.testing.assert_close(merge.sum(1), torch.ones(len(count)), rtol=1e-6, atol=0)


def literally(correlation: Tensor, models: int, a: float, b: float) -> Tensor | None:
    """ZipIt's greedy matching as the paper says it, on lists; None where no pair is left that may be merged."""
    total, units = len(correlation), len(correlation) // models
    members = [[i] for i in range(total)]
    origin = [i // units for i in range(total)]
    score = {(i, j): float(correlation[i, j]) for i in range(total) for j in range(total) if i != j}
    left = [int((total - units) // models * b + 1e-4)] * models
    for _ in range(total - units):
        (row, column), best = max(score.items(), key=lambda entry: (entry[1], -entry[0][0], -entry[0][1]))
        if best == -torch.inf:
            return None
        row, column = min(row, column), max(row, column)
        members[row] += members[column]
        for k in {i for i, _ in score} - {row, column}:
            score[k, row] = a * min(score[k, row], score[k, column])
            score[row, k] = a * min(score[row, k], score[column, k])
        score = {pair: value for pair, value in score.items() if column not in pair}
        if origin[row] == origin[column]:
            left[origin[row]] -= 1
            if left[origin[row]] <= 0:
                score.update({(i, j): -torch.inf for i, j in score if origin[i] == origin[j] == origin[row]})
    labels = torch.zeros(total, dtype=torch.long)
    for number, row in enumerate(sorted({i for i, _ in score} or {0})):
        labels[members[row]] = number
    return labels


@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(1, 6), st.sampled_from([1e-4, 0.3, 1.0]), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_matching_is_the_paper_s_greedy_one(seed: int, models: int, units: int, a: float, b: float) -> None:
    """Reference: `literally`. Where bars leave it no pair, the matching still ends with as many units as it should."""
    x = torch.randn(models * units, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    correlation = correlation_of(torch.cov(x, correction=0).reshape(models * units, -1))
    expected = literally(correlation, models, a, b)
    found = zip_units(correlation, models, a, b)
    assert found.unique().tolist() == list(range(units))
    if expected is not None:
        assert torch.equal(found, expected)


@given(st.integers(0, 10**6), st.integers(1, 8), st.sampled_from([0.0, 0.3, 1.0]))
@settings(deadline=None, max_examples=40)
def test_without_pairs_within_a_model_units_are_matched_one_to_one(seed: int, units: int, a: float) -> None:
    """And so they are put where the first model has them."""
    x = torch.randn(2 * units, 9, generator=torch.Generator().manual_seed(seed))
    labels = keep_places(zip_units(correlation_of(torch.cov(x).reshape(2 * units, -1)), 2, a, 1.0, within=False), units)
    assert labels[:units].tolist() == list(range(units))
    assert sorted(labels[units:].tolist()) == list(range(units))


@pytest.mark.parametrize("a", [0.0, 0.3])
def test_matching_of_three_models_ends_whatever_is_barred(a: float) -> None:
    """With a = 0 nothing joins a merged unit of its own models; bars are lifted where they leave too many units."""
    for seed in range(20):
        x = torch.randn(12, 5, generator=torch.Generator().manual_seed(seed))
        for within in (True, False):
            labels = zip_units(correlation_of(torch.cov(x)), 3, a, 0.5, within=within)
            assert labels.unique().tolist() == [0, 1, 2, 3]


def test_merged_units_stand_where_own_s_stood() -> None:
    """Own's units 0 and 2 are one, 1 goes with a peer's, and two of the peer's fill the place of 2."""
    assert keep_places(torch.tensor([1, 0, 1, 2, 2, 0]), 3).tolist() == [0, 1, 0, 2, 2, 1]


def test_one_tensor_is_the_formula() -> None:
    """Reference: Σ_k M_out,k W_k U_in,k with dense matrices; rows of M are weighted means, U has ones."""
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3, 4, generator=g, dtype=torch.float64) for _ in range(2)]
    weights = [0.7, 0.3]
    rows, columns = torch.tensor([[0, 1, 0], [2, 2, 1]]), torch.tensor([[0, 1, 1, 3], [2, 2, 0, 3]])
    axes = [AxisRef("w", 0, ((Factor(3, "r"),),)), AxisRef("w", 1, ((Factor(4, "c"),),))]
    labels = [{"r": rows[k], "c": columns[k]} for k in range(2)]
    found = merge_units(tensors, weights, axes, labels, {"w": {1: 1}})
    mass = torch.zeros(3, dtype=torch.float64)
    for k in range(2):
        mass.index_add_(0, rows[k], torch.full((3,), weights[k], dtype=torch.float64))
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for k in range(2):
        merge = nn.functional.one_hot(rows[k], 3).T.double() * weights[k] / mass[:, None]
        expected += merge @ tensors[k] @ nn.functional.one_hot(columns[k], 4).double()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_axes_of_products_and_of_several_segments_follow_index_by_index() -> None:
    """Flattened channels × 2 positions, then the channels once more and two inputs that belong to nobody."""
    layout = ((Factor(3, "c"), Factor(2)), (Factor(3, "c"),), (Factor(2),))
    x = torch.arange(11.0, dtype=torch.float64)[None]
    labels = torch.tensor([1, 1, 2])
    added = merge_units([x], [1.0], [AxisRef("w", 1, layout)], [{"c": labels}], {"w": {1: 1}})
    assert added.tolist() == [[0, 0, 0 + 2, 1 + 3, 4, 5, 0, 6 + 7, 8, 9, 10]]
    mean = merge_units([x], [1.0], [AxisRef("w", 1, layout)], [{"c": labels}], {})
    assert mean.tolist() == [[0, 0, 1, 2, 4, 5, 0, 6.5, 8, 9, 10]]


def grouped_transposed() -> nn.Module:
    """A transposed convolution of two groups between two others."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, groups=2), nn.ReLU(), nn.Conv2d(6, 4, 3)
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (3, 4, 4)),
    "lenet": (LeNet, (3, 16, 16)),
    "vgg": (lambda: Vgg([8, "M", 12, 8]), (3, 8, 8)),
    "resnet": (lambda: ResNet(1, (6, 8, 10)), (3, 8, 8)),
    "unet": (UNet, (3, 8, 8)),
    "grouped": (Grouped, (3, 16)),
    "transposed": (grouped_transposed, (3, 8, 8)),
    "volume": (Volume, (1, 4, 6, 6)),
}


@cache
def network(name: str) -> MergeContext:
    build, shape = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(32, *shape, generator=g),) for _ in range(2)]
    return MergeContext(model, derive_symmetry(model, data[0]), data)


def weights_of(name: str, seed: int) -> Model:
    """Return random weights with running statistics of the data."""
    context = network(name)
    assert context.model is not None
    assert context.data is not None
    model = randomise(NETWORKS[name][0](), seed)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.train().reset_running_stats()
    with torch.no_grad():
        for inputs in context.data:
            model(*inputs)
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


def zipit(name: str, own: Model, peers: list[Model], mixing: list[float], **options: Any) -> Model:
    context = network(name)
    return merge_weights(
        own, peers, mixing, "zipit", model=context.model, spec=context.spec, data=context.data, repair="none", **options
    )


def output(name: str, weights: Model) -> Tensor:
    context = network(name)
    assert context.model is not None
    assert context.data is not None
    with torch.no_grad():
        return torch.cat([functional_call(context.model, weights, inputs) for inputs in context.data])


def apart(name: str, one: Model, other: Model) -> float:
    """Return the largest difference of outputs, relative to their spread."""
    expected = output(name, other)
    return float((output(name, one) - expected).abs().max() / expected.std())


@pytest.mark.parametrize("name", NETWORKS)
def test_units_that_do_the_same_are_merged_without_a_trace(name: str) -> None:
    """Reference: the network itself. In every group in turn, unit 1 is made a copy of unit 0 and then merged into it:
    their rows are averaged, their columns add up, and the place that is left does nothing."""
    context, own = network(name), weights_of(name, 1)
    assert context.model is not None
    assert context.spec is not None
    taken, axes = taken_axes(context.model, context.spec), axes_by_name(context.spec)
    for group in context.spec.groups:
        copied = {group.id: torch.tensor([0, 0, *range(2, group.size)])}
        made = {key: [axis for axis in listed if _makes(axis, group.id, taken)] for key, listed in axes.items()}
        twice = {
            key: _selected(tensor, made.get(key, []), copied) if tensor.is_floating_point() else tensor
            for key, tensor in own.items()
        }
        merged = {
            key: merge_units([tensor], [1.0], axes.get(key, []), [copied], taken) if tensor.ndim else tensor
            for key, tensor in twice.items()
        }
        assert not torch.equal(merged[group.axes[0][0]], twice[group.axes[0][0]])
        assert apart(name, merged, twice) < 1e-4, group.id


def _makes(axis: AxisRef, group: str, taken: Taken) -> bool:
    """Tell whether a layer makes the units here: not along its inputs, unless they are a convolution's groups."""
    blocks = taken.get(axis.tensor, {}).get(axis.dim)
    return blocks is None or (blocks > 1 and axis.layout[0][0] == Factor(blocks, group))


def _selected(tensor: Tensor, axes: list[AxisRef], moves: dict[str, Tensor]) -> Tensor:
    for axis in axes:
        index = torch.arange(layout_length(axis.layout))
        for factors, places in pieces(axis.layout):
            taken = places
            for position, factor in enumerate(factors):
                if factor.group in moves:
                    taken = taken.index_select(position, moves[factor.group])
            index[places.flatten()] = taken.flatten()
        tensor = tensor.index_select(axis.dim, index)
    return tensor


@pytest.mark.parametrize("name", ["mlp", "lenet", "vgg", "resnet", "unet"])
def test_a_permuted_copy_returns_own(name: str) -> None:
    """Exactness rule, ≤ 1e-6: residual streams, flattened channels and concatenations included."""
    own, spec = weights_of(name, 1), network(name).spec
    assert spec is not None
    peer = permute_weights(own, spec, random_permutations(spec, torch.Generator().manual_seed(3)))
    assert any(not torch.equal(peer[key], tensor) for key, tensor in own.items())
    found = zipit(name, own, [peer], [0.6, 0.4], b=0.0, within=False)
    assert worst(found, own) < 1e-6
    assert apart(name, zipit(name, own, [peer], [0.6, 0.4]), own) < 1e-4


@pytest.mark.parametrize("name", ["lenet", "resnet", "vgg"])
def test_pairs_across_models_are_align_and_average(name: str) -> None:
    """Reference: the pairs as a permutation, permute_weights and the average, with unequal weights."""
    own, spec = weights_of(name, 1), network(name).spec
    assert spec is not None
    moved = permute_weights(own, spec, random_permutations(spec, torch.Generator().manual_seed(3)))
    g = torch.Generator().manual_seed(4)
    peer = {
        k: t + 0.05 * t.std() * torch.randn(t.shape, generator=g) if t.is_floating_point() and t.ndim > 1 else t
        for k, t in moved.items()
    }
    context = network(name)
    assert context.model is not None
    found = align_weights(context.model, own, peer, spec, [x for (x,) in context.data or ()], stable_within=None)
    expected = dict(average(own, [permute_weights(peer, spec, found)], [0.7, 0.3]))
    assert worst(zipit(name, own, [peer], [0.7, 0.3], within=False), expected) < 1e-6


def test_units_that_a_model_has_twice_are_merged_within_it() -> None:
    """Own computes each of six features twice, the peer six others: twelve units hold both networks whole.

    Each logit is read from half the copies, so that one to one matching must lose something and ZipIt nothing.
    """
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(256, 20, generator=g),)]
    model = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 4))
    spec = derive_symmetry(model, data[0])
    models: list[Model] = []
    for k in range(2):
        rows = torch.zeros(6, 20)
        rows[:, 10 * k : 10 * k + 10] = torch.randn(6, 10, generator=g)
        order = torch.randperm(12, generator=g)
        models.append(
            {
                "0.weight": rows.repeat(2, 1)[order],
                "0.bias": torch.randn(6, generator=g).repeat(2)[order],
                "2.weight": torch.randn(4, 12, generator=g),
                "2.bias": torch.randn(4, generator=g),
            }
        )
    with torch.no_grad():
        ensemble = sum(functional_call(model, weights, data[0]) for weights in models) / 2

        def error(**options: Any) -> float:
            merged = merge_weights(*(models[0], [models[1]], [0.5, 0.5], "zipit"), model=model, data=data, **options)
            return float((functional_call(model, merged, data[0]) - ensemble).abs().max())

        assert spec.groups[0].size == 12
        assert error(a=1.0, b=1.0) < 1e-5
        assert error(a=1.0, b=1.0, within=False) > 0.1


def test_residual_networks_of_different_initialisation_merge_to_something_that_works() -> None:
    """Three models through the preset: schema kept, finite, order of peers of no account, a dead peer ignored."""
    models = [weights_of("resnet", seed) for seed in (1, 2, 3, 4)]
    found = zipit("resnet", models[0], models[1:3], [0.5, 0.3, 0.2])
    assert {key: t.shape for key, t in found.items()} == {key: t.shape for key, t in models[0].items()}
    assert torch.isfinite(output("resnet", found)).all()
    assert_same_bits(zipit("resnet", models[0], models[2:0:-1], [0.5, 0.2, 0.3]), found)
    assert_same_bits(zipit("resnet", models[0], models[1:], [0.5, 0.3, 0.2, 0.0]), found)
    assert worst(zipit("resnet", models[0], [models[1], models[1], models[2]], [0.5, 0.1, 0.2, 0.2]), found) < 1e-6


def test_taken_axes() -> None:
    """By the kind of layer: where a merged unit's weights add up. An output layer tied to its embedding does not."""
    for name, inner in (("unet", "up.weight"), ("transposed", "2.weight")):
        context = network(name)
        assert context.model is not None
        assert context.spec is not None
        taken = taken_axes(context.model, context.spec)
        assert list(taken[inner]) == [0]
    text = TiedText()
    spec = derive_symmetry(text, (torch.arange(14).view(2, 7) % 20,))
    assert taken_axes(text, spec)["out.weight"] == taken_axes(text, spec)["embedding.weight"] == {}
    assert taken_axes(text, spec)["up.weight"] == {1: 1}
    recurrent = nn.LSTM(4, 5, batch_first=True)
    assert taken_axes(recurrent, spec)["weight_hh_l0"] == {1: 1}


def test_tied_weights_stay_tied() -> None:
    """An embedding that is the output layer too: one merge for both names; a permuted copy is found out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TiedText().eval()
    g = torch.Generator().manual_seed(0)
    data = [(torch.randint(0, 20, (64, 7), generator=g),)]
    spec = derive_symmetry(model, data[0])
    own = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    own["out.weight"] = own["embedding.weight"]
    peer = permute_weights(own, spec, random_permutations(spec, g))
    found = merge_weights(own, [peer], [0.5, 0.5], "zipit", model=model, data=data, b=0.0, within=False)
    assert torch.equal(found["out.weight"], found["embedding.weight"])
    assert worst(found, own) < 1e-6


def test_a_model_without_groups_is_averaged_by_index() -> None:
    """Nothing may move in a single layer."""
    model, data = nn.Linear(3, 2), [torch.randn(4, 3, generator=torch.Generator().manual_seed(0))]
    models = [{"weight": torch.full((2, 3), float(k)), "bias": torch.zeros(2)} for k in range(2)]
    found = merge_weights(models[0], [models[1]], [0.25, 0.75], "zipit", model=model, data=data)
    assert torch.equal(found["weight"], torch.full((2, 3), 0.75))


@pytest.mark.parametrize("method", ["zipit", "pleas"])
def test_what_is_missing_is_said_in_one_line(method: str) -> None:
    """From Python, and as the merge of files calls it, without a model."""
    own, peer = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    with pytest.raises(MergeError, match=f"combine method '{method}' needs the model and data"):
        combine(method, own, [peer], [0.5, 0.5])
    with pytest.raises(MergeError, match="model"):
        merge_weights(own, [peer], [0.5, 0.5], method)
    assert torch.equal(combine(method, own, [peer], [1.0, 0.0])["w"], own["w"])


def test_a_plan_needs_symmetry_where_it_aligns_or_zips() -> None:
    """What decides whether a driver derives a spec."""
    assert not needs_symmetry(plan_merge(MergeConfig(method="average")))
    assert not needs_symmetry(plan_merge(MergeConfig(method="pleas", align=NamedConfig(name="none"))))
    assert needs_symmetry(plan_merge(MergeConfig(method="zipit")))
    assert needs_symmetry(plan_merge(MergeConfig(method="dimat")))


def test_the_model_is_left_as_it_is() -> None:
    """Mode, weights, running statistics, and the global random state."""
    context = network("resnet")
    assert context.model is not None
    context.model.train()
    before = {key: tensor.clone() for key, tensor in context.model.state_dict().items()}
    models = [weights_of("resnet", seed) for seed in (1, 2)]
    state = torch.get_rng_state()
    zipit("resnet", models[0], models[1:], [0.5, 0.5], max_images=16)
    assert torch.equal(torch.get_rng_state(), state)
    assert context.model.training
    context.model.eval()
    assert_same_bits(context.model.state_dict(), before)
