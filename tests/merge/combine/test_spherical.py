"""SLERP, NuSLERP, the Karcher mean, model stock and layer swapping.

References: mergekit's outputs on a tiny Llama (`tests/golden/mergekit.safetensors`, float32: its last bits are the
tolerance, 2e-7 of values up to 1.01), angles on known circles, and gradients of the Fréchet sum.
"""

from __future__ import annotations

from math import cos, radians, sin
from typing import Any

import pytest
import torch
from torch import Tensor

from dimat.errors import MergeError
from dimat.merge.combine.average import average
from dimat.merge.combine.karcher import karcher
from dimat.merge.combine.layer_swap import layer_swap
from dimat.merge.combine.model_stock import model_stock
from dimat.merge.combine.nuslerp import nuslerp
from dimat.merge.combine.slerp import slerp
from tests.merge.combine.test_task_vectors import THIRDS, assert_golden, llama, mlp, part


def at(degrees: float, length: float = 1.0) -> dict[str, Tensor]:
    """Return one vector in the plane."""
    turn = radians(degrees)
    return {"w": torch.tensor([cos(turn), sin(turn)], dtype=torch.float64) * length}


def test_slerp_golden() -> None:
    """mergekit `slerp` of base and t2, t 0.3: norm weights lie within 0.4° of each other and are mixed linearly."""
    base, models = llama()
    assert_golden(slerp(base, [models[2]], [0.7, 0.3]), part("mergekit", "slerp_t03"))
    assert_golden(slerp(base, [models[2]], [0.5, 0.5], t=0.3), part("mergekit", "slerp_t03"))


@pytest.mark.parametrize(("lerp_above", "straight"), [(1.0, False), (0.7, False), (0.49, True), (0.0, True)])
def test_slerp_is_linear_where_models_are_nearer_than_lerp_above(lerp_above: float, straight: bool) -> None:
    """60° apart, cos Ω = 0.5: half-way on the arc the length is 1, on the chord cos 30°."""
    got = slerp(at(0), [at(60)], [0.5, 0.5], lerp_above=lerp_above)["w"]
    torch.testing.assert_close(got, at(30, cos(radians(30)) if straight else 1.0)["w"], rtol=0, atol=1e-12)


def test_nuslerp_golden() -> None:
    """mergekit `nuslerp` of t0 and t1, weights 0.6 and 0.4."""
    _, models = llama()
    assert_golden(nuslerp(models[0], [models[1]], [0.6, 0.4]), part("mergekit", "nuslerp"))


@pytest.mark.parametrize("merge", [slerp, nuslerp, karcher])
@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_on_a_circle(merge: Any, t: float) -> None:
    """Reference: 80° apart, the angle goes in proportion to the weight and the length stays."""
    got = merge(at(20, 3.0), [at(100, 3.0)], [1 - t, t])
    torch.testing.assert_close(got["w"], at(20 + 80 * t, 3.0)["w"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("merge", [slerp, nuslerp])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_endpoints_are_exact(merge: Any, dtype: torch.dtype) -> None:
    """Weight 0 and 1 return the models themselves, bit for bit."""
    _, models = llama()
    own, peer = ({name: t.to(dtype) for name, t in model.items()} for model in models[:2])
    for mixing, expected in (([1.0, 0.0], own), ([0.0, 1.0], peer)):
        assert_golden(merge(own, [peer], mixing), expected, 0)
    assert_golden(merge(own, [peer], [0.5, 0.5], t=1.0), peer, 0)
    assert_golden(nuslerp(own, [peer], [0.0, 1.0], deltas=True, base=own), peer, 0)


def test_slerp_where_the_arc_is_not_defined() -> None:
    """Opposite, zero and parallel vectors mix linearly."""
    for own, peer in ((at(0), at(180)), (at(0), at(0, 0.0)), (at(0), at(0, 2.0))):
        for merge in (slerp, nuslerp):
            expected = own["w"] + 0.25 * (peer["w"] - own["w"])
            torch.testing.assert_close(merge(own, [peer], [0.75, 0.25])["w"], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("merge", [slerp, nuslerp])
def test_more_than_two_models_are_an_error_that_names_the_way_out(merge: Any) -> None:
    """A peer of weight 0 is no third model."""
    with pytest.raises(MergeError, match="karcher"):
        merge(at(0), [at(10), at(20)], [0.5, 0.25, 0.25])
    torch.testing.assert_close(merge(at(0), [at(10), at(20)], [0.5, 0.0, 0.5])["w"], at(10)["w"])


def test_nuslerp_along_rows_and_columns() -> None:
    """Reference: each row, or column, merged by itself as a vector."""
    g = torch.Generator().manual_seed(0)
    own, peer = (torch.randn(4, 3, 2, generator=g, dtype=torch.float64) for _ in range(2))
    rows = nuslerp({"w": own}, [{"w": peer}], [0.7, 0.3], along="rows")["w"]
    for k in range(4):
        alone = nuslerp({"w": own[k].flatten()}, [{"w": peer[k].flatten()}], [0.7, 0.3])["w"]
        torch.testing.assert_close(rows[k].flatten(), alone)
    columns = nuslerp({"w": own}, [{"w": peer}], [0.7, 0.3], along="columns")["w"].flatten(1)
    for k in range(6):
        alone = nuslerp({"w": own.flatten(1)[:, k]}, [{"w": peer.flatten(1)[:, k]}], [0.7, 0.3])["w"]
        torch.testing.assert_close(columns[:, k], alone)


def test_nuslerp_of_deltas_turns_around_the_base() -> None:
    """Reference: the circle shifted by the base."""
    base = {"w": torch.tensor([5.0, -7.0], dtype=torch.float64)}
    own, peer = ({"w": base["w"] + at(angle)["w"]} for angle in (0, 90))
    got = nuslerp(own, [peer], [0.5, 0.5], base=base, deltas=True)
    torch.testing.assert_close(got["w"] - base["w"], at(45)["w"])


def test_complex_tensors_turn_as_real_ones() -> None:
    """Parts are entries."""
    g = torch.Generator().manual_seed(0)
    own, peer = (torch.randn(5, 2, generator=g, dtype=torch.float64) for _ in range(2))
    for merge in (slerp, nuslerp, karcher):
        got = merge({"w": torch.view_as_complex(own)}, [{"w": torch.view_as_complex(peer)}], [0.6, 0.4])["w"]
        torch.testing.assert_close(torch.view_as_real(got), merge({"w": own}, [{"w": peer}], [0.6, 0.4])["w"])


@pytest.mark.parametrize("count", [2, 3, 5])
def test_karcher_mean_is_where_the_pulls_cancel(count: int) -> None:
    """Reference: the gradient of Σ w Ω² vanishes (in the ambient space, by autograd), and no nearby point is better."""
    g = torch.Generator().manual_seed(count)
    centre = torch.randn(30, generator=g, dtype=torch.float64)
    models = [centre + torch.randn(30, generator=g, dtype=torch.float64) for _ in range(count)]
    raw = torch.rand(count, generator=g, dtype=torch.float64) + 0.1
    weights = (raw / raw.sum()).tolist()
    got = karcher({"w": models[0]}, [{"w": m} for m in models[1:]], weights)["w"]

    def spread(x: Tensor) -> Tensor:
        angles = [(x / x.norm() @ (m / m.norm())).clamp(-1, 1).acos() for m in models]
        return torch.stack([w * angle.square() for w, angle in zip(weights, angles)]).sum()

    x = (got / got.norm()).requires_grad_()
    (gradient,) = torch.autograd.grad(spread(x), x)
    assert float(gradient.norm()) < 1e-8
    assert float(got.norm()) == pytest.approx(sum(w * float(m.norm()) for w, m in zip(weights, models)))
    for _ in range(5):
        step = torch.randn(30, generator=g, dtype=torch.float64) * 0.05
        assert spread(got / got.norm() + step) > spread(got)


def test_karcher_of_three_on_a_circle() -> None:
    """Reference: on a half circle the mean of angles; lengths are averaged apart."""
    got = karcher(at(0, 1.0), [at(30, 2.0), at(75, 3.0)], [0.5, 0.25, 0.25])
    torch.testing.assert_close(got["w"], at(0.25 * 105, 1.75)["w"], rtol=0, atol=1e-9)


def test_karcher_without_a_direction_is_the_average() -> None:
    """Opposite vectors of equal weight; a zero vector counts with its length alone."""
    torch.testing.assert_close(karcher(at(0), [at(180)], [0.5, 0.5])["w"], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(karcher(at(0, 2.0), [at(90, 0.0)], [0.5, 0.5])["w"], at(0)["w"])
    opposed = karcher({"w": torch.tensor([2.0])}, [{"w": torch.tensor([-1.0])}], [0.75, 0.25])["w"]
    assert opposed.tolist() == [1.75]  # the sphere of one axis is two points: the heavier one, at the mean length


def test_model_stock_golden() -> None:
    """mergekit `model_stock`, ratio not kept in [0, 1]: the norm layers' deltas oppose each other, t = −0.36."""
    base, models = llama()
    got = model_stock(models[0], models[1:], THIRDS, base=base, clamp=False)
    assert_golden(got, part("mergekit", "model_stock"))


@pytest.mark.parametrize(("angle", "t"), [(0, 1.0), (60, 2 / 3), (90, 0.0), (120, 0.0)])
def test_model_stock_of_two(angle: float, t: float) -> None:
    """Reference: t = 2 cos Ω / (1 + cos Ω), within [0, 1]."""
    base = {"w": torch.zeros(2, dtype=torch.float64)}
    mean = (at(0)["w"] + at(angle)["w"]) / 2
    got = model_stock(at(0), [at(angle)], [0.5, 0.5], base=base)["w"]
    torch.testing.assert_close(got, t * mean, rtol=0, atol=1e-12)


def test_model_stock_is_the_point_of_the_plane_nearest_to_the_centre() -> None:
    """Reference: the paper's geometry. Models on a sphere around a centre μ, at equal angles: among the points
    t · mean, t is such that μ − t · mean is orthogonal to the mean; for unequal weights too."""
    mu, noise = torch.zeros(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64) * 2
    mu[7] = 1.5
    base = {"w": torch.zeros(8, dtype=torch.float64)}
    for weights in ([0.25] * 4, [0.4, 0.3, 0.2, 0.1]):
        models = [{"w": mu + noise[k]} for k in range(4)]
        got = model_stock(models[0], models[1:], weights, base=base)["w"]
        mean = torch.stack([w * m["w"] for w, m in zip(weights, models)]).sum(0)
        assert float((mu - got) @ mean) == pytest.approx(0.0, abs=1e-12)


def test_model_stock_filter_wise_and_the_pole() -> None:
    """One ratio for each row, as rows on their own; and cos Ω = −1, where the ratio has no value."""
    base, models = mlp()
    name = "fc2.weight"
    whole = model_stock(
        {"w": models[0][name]}, [{"w": models[1][name]}], [0.5, 0.5], base={"w": base[name]}, filter_wise=True
    )["w"]
    for k in range(0, 48, 7):
        row = model_stock(
            {"w": models[0][name][k]}, [{"w": models[1][name][k]}], [0.5, 0.5], base={"w": base[name][k]}
        )["w"]
        torch.testing.assert_close(whole[k], row)
    zero = {"w": torch.zeros(1)}
    for clamp in (True, False):
        got = model_stock({"w": torch.ones(1)}, [{"w": -torch.ones(1)}], [0.5, 0.5], base=zero, clamp=clamp)
        assert got["w"].item() == 0.0


def test_layer_swap_by_pattern() -> None:
    """The first pattern that matches decides; the rest is averaged, or someone's."""
    _, (own, first, second, _) = mlp()
    weights = [0.5, 0.3, 0.2]
    mean = average(own, [first, second], weights)
    got = layer_swap(own, [first, second], weights, layers={"fc1.*": 1, "fc*": 2, "head.bias": 0})
    for name in own:
        expected = {"fc1": first, "fc2": second}.get(name.split(".")[0], own if name == "head.bias" else mean)
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-7 if expected is mean else 0)
    kept = layer_swap(own, [first, second], weights, layers={"head.*": "average"}, rest=1)
    assert torch.equal(kept["fc1.weight"], first["fc1.weight"])
    torch.testing.assert_close(kept["head.bias"], mean["head.bias"], rtol=0, atol=1e-7)


def test_layer_swap_errors() -> None:
    """A pattern that matches nothing, a model that is not there."""
    _, (own, first, *_) = mlp()
    with pytest.raises(MergeError, match=r"no tensor's name matches 'fc9\.\*'"):
        dict(layer_swap(own, [first], [0.5, 0.5], layers={"fc9.*": 1}))
    for options in ({"layers": {"fc1.*": 2}}, {"rest": 2}):
        with pytest.raises(MergeError, match=r"takes model 2, there are own \(0\) and 1 peers"):
            dict(layer_swap(own, [first], [0.5, 0.5], **options))  # type: ignore[arg-type]


def test_angles_are_of_whole_tensors() -> None:
    """A kernel is one vector, whatever its axes."""
    g = torch.Generator().manual_seed(0)
    own, peer = (torch.randn(3, 2, 5, generator=g, dtype=torch.float64) for _ in range(2))
    for merge in (slerp, nuslerp, karcher):
        flat = merge({"w": own.flatten()}, [{"w": peer.flatten()}], [0.6, 0.4])["w"]
        torch.testing.assert_close(merge({"w": own}, [{"w": peer}], [0.6, 0.4])["w"].flatten(), flat)
