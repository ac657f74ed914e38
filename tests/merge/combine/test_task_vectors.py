"""Task arithmetic, TIES, MagMax, consensus, PCB-Merging and EMR.

References: `tests/golden/mergekit.safetensors` (mergekit 0.1.5 on a tiny Llama, models t0 to t2) and
`fusionbench_mlp.safetensors` (fusion_bench 0.2.33 on an MLP, tasks 0 to 3 of `opcm_mlp.safetensors`), both computed in
float32. Ours sums in float64, so the tolerance is float32's last bits: 2e-7 of values up to 1.03.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dimat.errors import MergeError
from dimat.merge.combine.consensus import consensus, tall_masks
from dimat.merge.combine.emr import emr
from dimat.merge.combine.magmax import magmax
from dimat.merge.combine.pcb import pcb_merging
from dimat.merge.combine.task_arithmetic import task_arithmetic
from dimat.merge.combine.ties import ties
from tests.merge.methods import Counted

GOLDEN = Path(__file__).parents[2] / "golden"
TOLERANCE = 2e-7
Model = dict[str, Tensor]


@cache
def golden(name: str) -> Model:
    return load_file(GOLDEN / f"{name}.safetensors")


def part(file: str, prefix: str) -> Model:
    return {key[len(prefix) + 1 :]: t for key, t in golden(file).items() if key.startswith(prefix + ".")}


def llama() -> tuple[Model, list[Model]]:
    return part("mergekit", "in.base"), [part("mergekit", f"in.t{k}") for k in range(3)]


def mlp() -> tuple[Model, list[Model]]:
    return part("opcm_mlp", "in.base"), [part("opcm_mlp", f"in.task{k}") for k in range(4)]


def assert_golden(got: Mapping[str, Tensor], expected: Model, tolerance: float = TOLERANCE) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


MERGEKIT_WEIGHTS = [0.5, 0.3, 0.4]
THIRDS = [1 / 3] * 3
QUARTERS = [0.25] * 4


def toy(*deltas: list[float]) -> tuple[Model, list[Model]]:
    """Return a base of ones and models that differ from it by these deltas in one vector."""
    base = {"w": torch.ones(len(deltas[0]), dtype=torch.float64)}
    return base, [{"w": base["w"] + torch.tensor(d, dtype=torch.float64)} for d in deltas]


def delta_of(merged: Model) -> list[float]:
    return [round(x, 9) for x in (merged["w"] - 1).tolist()]


def test_task_arithmetic_golden() -> None:
    """mergekit `task_arithmetic`, weights 0.5, 0.3, 0.4, which do not sum to 1."""
    base, models = llama()
    got = task_arithmetic(models[0], models[1:], THIRDS, base=base, weights=MERGEKIT_WEIGHTS)
    assert_golden(got, part("mergekit", "task_arithmetic"))


def test_task_arithmetic_by_hand() -> None:
    """base + scaling Σ w τ; `normalize` divides by Σ w; a negative weight takes a task away."""
    base, (own, peer) = toy([1.0, 0.0], [0.0, 2.0])
    assert delta_of(task_arithmetic(own, [peer], [0.75, 0.25], base=base)) == [0.75, 0.5]
    assert delta_of(task_arithmetic(own, [peer], [0.75, 0.25], base=base, scaling=2.0)) == [1.5, 1.0]
    assert delta_of(task_arithmetic(own, [peer], [0.5, 0.5], base=base, weights=[3.0, 1.0])) == [3.0, 2.0]
    both = task_arithmetic(own, [peer], [0.5, 0.5], base=base, weights=[3.0, 1.0], normalize=True)
    assert delta_of(both) == [0.75, 0.5]
    assert delta_of(task_arithmetic(own, [peer], [0.5, 0.5], base=base, weights=[1.0, -1.0])) == [1.0, -2.0]
    opposed = task_arithmetic(own, [peer], [0.5, 0.5], base=base, weights=[1.0, -1.0], normalize=True)
    assert delta_of(opposed) == [1.0, -2.0]


def test_weights_that_do_not_fit_are_errors() -> None:
    """One finite number per model, not all 0."""
    base, (own, peer) = toy([1.0], [2.0])
    for weights, message in (
        ([1.0], "1 numbers for 2 models"),
        ([0.0, 0.0], "not all 0"),
        ([1.0, torch.nan], "finite"),
    ):
        with pytest.raises(MergeError, match=message):
            dict(task_arithmetic(own, [peer], [0.5, 0.5], base=base, weights=weights))


def test_ties_golden_trimmed_per_tensor() -> None:
    """mergekit `ties`, density 0.5, normalize true."""
    base, models = llama()
    got = ties(models[0], models[1:], THIRDS, base=base, weights=MERGEKIT_WEIGHTS, density=0.5)
    assert_golden(got, part("mergekit", "ties_d05"))


@pytest.mark.parametrize("how", ["mean", "max"])
def test_ties_golden_trimmed_over_the_whole_vector(how: Any) -> None:
    """fusion_bench `ties`, threshold 20 %, scaling 0.3."""
    base, models = mlp()
    got = ties(models[0], models[1:], QUARTERS, base=base, density=0.2, trim="vector", merge_func=how, scaling=0.3)
    assert_golden(got, part("fusionbench_mlp", f"ties_{how}_k20"))


def test_ties_by_hand() -> None:
    """Trim to 3 of 4, elect by weighted sums, merge what agrees."""
    base, (own, peer) = toy([4.0, -3.0, 0.1, 2.0], [-1.0, -5.0, 3.0, 0.2])
    options: dict[str, Any] = {"base": base, "density": 0.75}
    assert delta_of(ties(own, [peer], [0.5, 0.5], **options)) == [4.0, -4.0, 3.0, 2.0]
    assert delta_of(ties(own, [peer], [0.5, 0.5], merge_func="sum", **options)) == [2.0, -4.0, 1.5, 1.0]
    assert delta_of(ties(own, [peer], [0.5, 0.5], merge_func="max", **options)) == [4.0, -5.0, 3.0, 2.0]
    assert delta_of(ties(own, [peer], [0.1, 0.9], **options)) == [-1.0, -4.8, 3.0, 2.0]


def test_ties_at_density_one_with_one_task_is_task_arithmetic() -> None:
    """For each way to merge and to trim."""
    base, models = mlp()
    expected = task_arithmetic(models[0], [], [1.0], base=base, weights=[1.0], scaling=0.4)
    for trim in ("tensor", "vector"):
        for how in ("mean", "sum", "max"):
            got = ties(
                models[0], [], [1.0], base=base, weights=[1.0], density=1.0, trim=trim, merge_func=how, scaling=0.4
            )
            assert_golden(got, expected, 0)


def test_ties_a_vote_that_ties_elects_plus() -> None:
    """Equal and opposite changes, in either order; three that cancel but for rounding."""
    base, (own, peer) = toy([1.0, -2.0], [-1.0, 2.0])
    for first, second in ((own, peer), (peer, own)):
        assert delta_of(ties(first, [second], [0.5, 0.5], base=base, density=1.0)) == [1.0, 2.0]
    base, models = toy([0.1], [0.2], [-0.3])
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        got = ties(models[order[0]], [models[k] for k in order[1:]], THIRDS, base=base, density=1.0)
        assert delta_of(got) == [0.15]


def test_magmax_golden_and_by_hand() -> None:
    """fusion_bench `magmax`, scaling 1; weights say who is louder; equal scores do not depend on order."""
    base, models = mlp()
    assert_golden(magmax(models[0], models[1:], QUARTERS, base=base), part("fusionbench_mlp", "magmax"))
    base, (own, peer) = toy([1.0, -3.0, 2.0, 0.0], [2.0, 1.0, -2.0, 0.0])
    for first, second in ((own, peer), (peer, own)):
        assert delta_of(magmax(first, [second], [0.5, 0.5], base=base)) == [2.0, -3.0, 2.0, 0.0]
    assert delta_of(magmax(own, [peer], [0.9, 0.1], base=base, scaling=0.5)) == [0.5, -1.5, 1.0, 0.0]


@pytest.mark.parametrize("k", [1, 2])
def test_consensus_golden(k: int) -> None:
    """fusion_bench TALL masks, λ 0.4; base + 0.3 Σ τ [count ≥ k]: 0.3 over four tasks is 1.2 times their mean."""
    base, models = mlp()
    expected = part("fusionbench_mlp", f"tall.consensus_k{k}")
    assert_golden(consensus(models[0], models[1:], QUARTERS, base=base, k=k, scaling=1.2), expected)
    summed = consensus(models[0], models[1:], QUARTERS, base=base, k=k, scaling=0.3, weights=[1.0] * 4)
    assert_golden(summed, expected)


def test_tall_masks_golden() -> None:
    """Every bit of the four masks."""
    base, models = mlp()
    for name, start in base.items():
        masks = tall_masks([model[name].double() - start.double() for model in models], [1.0] * 4, 0.4)
        for k, mask in enumerate(masks):
            assert torch.equal(mask, part("fusionbench_mlp", f"tall.mask{k}")[name].bool())


@pytest.mark.parametrize(("tall_lambda", "kept"), [(0.0, [6.0, 4.0]), (0.4, [6.0, 0.0]), (2.0, [0.0, 0.0])])
def test_a_larger_tall_lambda_needs_more_of_a_task(tall_lambda: float, kept: list[float]) -> None:
    """Deltas of two models (8, 8) and (4, 0), k = 2: the other's share of the second element is all or nothing."""
    base = {"w": torch.zeros(2, dtype=torch.float64)}
    own, peer = ({"w": torch.tensor(delta, dtype=torch.float64)} for delta in ([8.0, 8.0], [4.0, 0.0]))
    got = consensus(own, [peer], [0.5, 0.5], base=base, k=2, tall_lambda=tall_lambda)
    assert got["w"].tolist() == kept


def test_consensus_k_zero_is_task_arithmetic_and_large_k_is_capped() -> None:
    """Bit for bit; k beyond the number of models counts as that number."""
    base, models = mlp()
    weights = [0.1, 0.2, 0.3, 0.4]
    plain = task_arithmetic(models[0], models[1:], weights, base=base, scaling=0.7)
    assert_golden(consensus(models[0], models[1:], weights, base=base, k=0, scaling=0.7), plain, 0)
    all_four, nine = (consensus(models[0], models[1:], weights, base=base, k=k) for k in (4, 9))
    assert_golden(all_four, nine, 0)


def test_pcb_golden() -> None:
    """fusion_bench `PCB_merge`, ratio 0.1, λ 1.2: all d elements, those at a threshold too."""
    base, models = mlp()
    got = pcb_merging(models[0], models[1:], QUARTERS, base=base, ratio=0.1, scaling=1.2)
    assert_golden(got, part("fusionbench_mlp", "pcb_root_r01_l12"))


def test_pcb_on_few_elements() -> None:
    """One element in the whole model: quantiles fall together and nothing is divided by their distance."""
    base, (own, peer) = toy([1.0], [3.0])
    got = pcb_merging(own, [peer], [0.5, 0.5], base=base)
    assert delta_of(got) == [2.0]


def test_emr_golden() -> None:
    """fusion_bench `emr`: the elected task vector; and task 0's model, masked and rescaled."""
    base, models = mlp()
    unified = emr(models[0], models[1:], QUARTERS, base=base, output="unified")
    expected = part("fusionbench_mlp", "emr.unified")
    assert_golden(unified, {name: base[name] + tensor for name, tensor in expected.items()})
    own = emr(models[0], models[1:], QUARTERS, base=base)
    assert_golden(own, part("fusionbench_mlp", "emr.task0"))


def test_emr_by_hand() -> None:
    """Own's mask and mean magnitude, whether own has a vote or not; per element in one tensor is the same."""
    base, (own, peer) = toy([1.0, -2.0, 1.0], [3.0, 1.0, 5.0])
    got = emr(own, [peer], [0.5, 0.5], base=base)  # τ = [3, −2, 5], mask all, λ = 4/10
    assert delta_of(got) == [1.2, -0.8, 2.0]
    assert_golden(emr(own, [peer], [0.5, 0.5], base=base, balance="element"), got, 1e-15)
    assert delta_of(emr(own, [peer], [0.0, 1.0], base=base)) == [1.5, 0.0, 2.5]  # τ = peer, mask [1, 0, 1], λ = 4/8


@pytest.mark.parametrize(
    ("merge", "options", "passes"),
    [
        (task_arithmetic, {}, 1),
        (ties, {}, 1),
        (ties, {"trim": "vector"}, 3),
        (magmax, {}, 1),
        (consensus, {}, 1),
        (emr, {}, 2),
        (pcb_merging, {}, 5),
    ],
    ids=["task-arithmetic", "ties", "ties-vector", "magmax", "consensus", "emr", "pcb-merging"],
)
def test_peers_are_read_as_often_as_documented(merge: Any, options: dict[str, Any], passes: int) -> None:
    """Tensor by tensor: what is global takes more passes, not more memory."""
    base, models = mlp()
    peers = [Counted(model) for model in models[1:]]
    dict(merge(models[0], peers, QUARTERS, base=base, **options))
    for peer in peers:
        assert Counter(peer.reads) == dict.fromkeys(models[0], passes)


def test_complex_tensors_merge_by_their_parts() -> None:
    """A sign needs real numbers: real and imaginary parts are elements of their own."""
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(5, 2, generator=g, dtype=torch.float64) for _ in range(3)]
    models = [{"w": torch.view_as_complex(p)} for p in parts]
    for merge in (ties, magmax, consensus, task_arithmetic, emr):
        got = merge(models[0], models[1:2], [0.5, 0.5], base=models[2])["w"]
        expected = merge({"w": parts[0]}, [{"w": parts[1]}], [0.5, 0.5], base={"w": parts[2]})["w"]
        torch.testing.assert_close(torch.view_as_real(got), expected)
