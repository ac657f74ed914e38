"""OPCM on whole models: tensors of all kinds, order, errors, and the preset in a simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from dimat.config import MergeConfig, NamedConfig
from dimat.errors import ConfigError, MergeError
from dimat.merge import MergeContext, Peer, merge, open_weights, plan_merge
from dimat.merge.combine.opcm import opcm
from dimat.merge.tensors.projection import FoldLayout, split_ranks
from dimat.seeds import torch_generator
from dimat.simulate import run_simulation
from dimat.tasks.registry import load_task
from tests.merge.opcm_reference import (
    BASE,
    TASKS,
    Model,
    assert_bits,
    assert_close,
    drawn,
    length,
    plain_fold,
)
from tests.simulate.helpers import tiny_experiment


def small(seed: int, scale: float = 1.0) -> Model:
    g = torch.Generator().manual_seed(seed)
    shapes = {"fc.weight": (6, 4), "fc.bias": (6,), "conv.weight": (5, 3, 2, 2), "one": (1, 1), "scalar": ()}
    return {name: torch.randn(shape, generator=g) * scale for name, shape in shapes.items()}


def trained(seed: int, base: Model, scale: float = 0.1) -> Model:
    return {name: base[name] + tensor for name, tensor in small(seed, scale).items()}


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 99),
    count=st.integers(2, 4),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
    diagonal=st.booleans(),
)
def test_the_merged_delta_has_the_mean_norm(seed: int, count: int, alpha: float, diagonal: bool) -> None:
    """‖M‖ = mean ‖T_i‖ over all tensors; and at alpha 0 without diagonal, M is along Σ T_i, whatever the order."""
    base = {name: t.double() for name, t in small(seed).items()}
    models = [{n: base[n] + t for n, t in small(seed + 1 + k, 0.1 * (k + 1)).items()} for k in range(count)]
    result = opcm(models[0], models[1:], [1 / count] * count, base=base, alpha=alpha, diagonal=diagonal)
    merged = {name: result[name] - base[name] for name in base}
    norms = [length({name: model[name] - base[name] for name in base}) for model in models]
    assert length(merged) == pytest.approx(sum(norms) / count, rel=1e-9)
    if alpha == 0 and not diagonal:
        summed = {name: sum((m[name] - base[name] for m in models), torch.zeros(())) for name in base}
        factor = length(merged) / length(summed)
        assert_close(merged, {name: tensor * factor for name, tensor in summed.items()}, 1e-9)


def test_zero_deltas_and_deltas_that_cancel() -> None:
    """By hand: all zero gives the base; T and 0 give T at half its norm; T and −T give the base, not rounding blown up;
    equal models are one delta, whole."""
    base = {name: t.double() for name, t in small(0).items()}
    there = {name: base[name] + t for name, t in small(1, 0.1).items()}
    back = {name: base[name] - (there[name] - base[name]) for name in base}
    assert_bits(opcm(base, [base], [0.5, 0.5], base=base), base)
    half = {name: (base[name] + there[name]) / 2 for name in base}
    for own, peer in ((base, there), (there, base)):
        assert_close(opcm(own, [peer], [0.5, 0.5], base=base), half, 1e-12)
    assert_close(opcm(there, [back], [0.5, 0.5], base=base, alpha=0.0), base, 1e-12)
    assert_bits(opcm(there, [there, dict(there)], [0.4, 0.3, 0.3], base=base), there)


def test_who_takes_part() -> None:
    """Weights above 0 say who; sizes do not matter. Weight 1 on one model returns its bits, −0.0 and all."""
    base, (a, b, c) = small(0), (trained(k, small(0)) for k in (1, 2, 3))
    a["fc.bias"][0] = -0.0
    assert_bits(opcm(a, [b, c], [1.0, 0.0, 0.0], base=base), a)
    assert_bits(opcm(a, [], [1.0], base=base), a)
    assert_bits(opcm(b, [a, c], [0.0, 1.0, 0.0], base=base), a)
    pair = opcm(a, [b], [0.5, 0.5], base=base)
    assert_bits(opcm(a, [b, c], [0.9, 0.1, 0.0], base=base), pair)
    assert_bits(opcm(c, [b, a], [0.0, 0.3, 0.7], base=base), pair)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types(dtype: torch.dtype) -> None:
    """Reference: the same values in float32, to one rounding; types and inputs stay."""
    base, *models = (
        {n: t.to(dtype) for n, t in m.items()} for m in [small(0), *(trained(k, small(0)) for k in (1, 2))]
    )
    copies = [{n: t.clone() for n, t in m.items()} for m in (base, *models)]
    result = opcm(models[0], models[1:], [0.5, 0.5], base=base)
    wide = [{n: t.float() for n, t in m.items()} for m in (base, *models)]
    expected = opcm(wide[1], wide[2:], [0.5, 0.5], base=wide[0])
    assert_close(result, expected, 2**-8 if dtype == torch.bfloat16 else 2**-11)
    assert all(result[name].dtype == dtype for name in base)
    for model, copy in zip((base, *models), copies):
        assert_bits(model, copy)


def test_complex_tensors() -> None:
    """Reference: a definition by a full SVD with conjugates."""
    base = {"w": torch.zeros(6, 4, dtype=torch.complex128)}
    one, two = ({"w": torch.complex(drawn(k, 6, 4), drawn(k + 9, 6, 4))} for k in (1, 2))
    result = opcm(one, [two], [0.5, 0.5], base=base)["w"]
    mean = float(one["w"].norm() + two["w"].norm()) / 2
    candidates = []
    for first, second in ((one["w"], two["w"]), (two["w"], one["w"])):
        u, sigma, vh = torch.linalg.svd(first)
        a = u.mH @ second @ vh.mH
        k = int(split_ranks(sigma[None], 0.5))
        a[:k, :k] = 0
        y = first + u @ a @ vh
        candidates.append(float((result - y * (mean / y.norm())).abs().max()))
    assert min(candidates) < 1e-12


def test_strides_do_not_matter() -> None:
    """Reference: contiguous copies; hashes included, which set the order."""
    base, models = small(0), [trained(k, small(0)) for k in (1, 2, 3)]
    strided = [{n: t.mT.contiguous().mT if t.ndim > 1 else t for n, t in m.items()} for m in (*models, base)]
    expected = opcm(models[0], models[1:], [0.4, 0.3, 0.3], base=base)
    assert_close(opcm(strided[0], strided[1:3], [0.4, 0.3, 0.3], base=strided[3]), expected, 1e-6)


@pytest.mark.parametrize("by", ["storage", "model"])
def test_tied_tensors_are_one(by: str) -> None:
    """Reference: the model without the second name; so norms count it once."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 6)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.fc.weight

    base, models = small(0), [trained(k, small(0)) for k in (1, 2)]
    expected = opcm(models[0], models[1:], [0.5, 0.5], base=base)
    also = [m | {"head.weight": m["fc.weight"] if by == "storage" else m["fc.weight"].clone()} for m in (*models, base)]
    result = opcm(also[0], [also[1]], [0.5, 0.5], base=also[2], model=Tied() if by == "model" else None)
    assert_bits(result, expected | {"head.weight": expected["fc.weight"]})
    assert result["head.weight"].data_ptr() != result["fc.weight"].data_ptr()


def test_a_file_is_not_taken_for_tied(tmp_path: Path) -> None:
    """Reference: the same weights in memory. Tensors read one by one may lie where others lay."""
    base, models = small(0), [trained(k, small(0)) for k in (1, 2)]
    more = {f"layer{k}.weight": drawn(k, 6, 4).float() for k in range(20)}
    models = [m | {n: t * (1 + j) for n, t in more.items()} for j, m in enumerate(models)]
    base |= {n: t * 0.5 for n, t in more.items()}
    for k, model in enumerate(models):
        save_file(model, tmp_path / f"{k}.safetensors")
    files = [open_weights(tmp_path / f"{k}.safetensors") for k in range(2)]
    expected = opcm(models[0], models[1:], [0.5, 0.5], base=base)
    result = opcm(files[0], files[1:], [0.5, 0.5], base=base)
    assert_bits({n: result[n] for n in expected}, expected)


def test_buffers_are_no_part_of_a_delta() -> None:
    """Reference: the fold of the parameters alone, and the weighted average of the running statistics. `model` knows
    which tensors are buffers; without it, names of BatchNorm's do."""
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    net.register_buffer("scale", torch.ones(3))
    states = [
        {n: torch.rand_like(t) + k if t.is_floating_point() else t + k for n, t in net.state_dict().items()}
        for k in range(3)
    ]
    names = [n for n, _ in net.named_parameters()]
    base, own, peer = states
    alone = [{n: m[n] for n in names} for m in states]
    expected = opcm(alone[1], [alone[2]], [0.7, 0.3], base=alone[0])
    result = opcm(own, [peer], [0.7, 0.3], base=base, model=net)
    assert_bits({n: result[n] for n in names}, expected)
    for name in ("scale", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(result[name], 0.7 * own[name] + 0.3 * peer[name])
    assert result["1.num_batches_tracked"] == own["1.num_batches_tracked"] == 1
    without = opcm(
        *(
            [{n: t for n, t in m.items() if n != "scale"} for m in s]
            if isinstance(s, list)
            else {n: t for n, t in s.items() if n != "scale"}
            for s in (own, [peer])
        ),
        [0.7, 0.3],
        base={n: t for n, t in base.items() if n != "scale"},
    )
    assert_bits(without, {n: t for n, t in result.items() if n != "scale"})


def test_integers_and_flags_are_own_s() -> None:
    """They are no weights."""
    extra = [{"steps": torch.tensor(k), "mask": torch.tensor([True, k > 0])} for k in range(3)]
    own, peer, base = (trained(k, small(0)) | e for k, e in enumerate(extra))
    result = opcm(own, [peer], [0.5, 0.5], base=base)
    assert result["steps"] == 0
    assert torch.equal(result["mask"], own["mask"])


def test_kernels_are_matrices_and_depthwise_ones_vectors() -> None:
    """Reference: the fold of (O, I·kh·kw) matrices; a depthwise kernel is summed as a bias is. Shape (O, 1, …) alone is
    not depthwise where a model says that the image is grey."""
    base = {"conv.weight": drawn(0, 6, 3, 2, 2), "deep.weight": drawn(1, 6, 1, 3, 3)}
    one, two = ({n: t + 0.1 * drawn(10 * k + t.shape[1], *t.shape) for n, t in base.items()} for k in (1, 2))

    def flat(m: Model, deep: int) -> Model:
        return {"conv.weight": m["conv.weight"].flatten(1), "deep.weight": m["deep.weight"].flatten(deep)}

    class Net(nn.Module):
        def __init__(self, grey: bool) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 2)
            self.deep = nn.Conv2d(1, 6, 3) if grey else nn.Conv2d(6, 6, 3, groups=6)

    for model, deep in ((None, 0), (Net(grey=False), 0), (Net(grey=True), 1)):
        result = opcm(one, [two], [0.5, 0.5], base=base, model=model)
        expected = [
            plain_fold(flat(base, deep), [flat(m, deep) for m in order], 0.5, False)[0]
            for order in ((one, two), (two, one))
        ]
        assert min(max(float((flat(result, deep)[n] - e[n]).abs().max()) for n in e) for e in expected) < 1e-10


def test_fused_weights_are_split() -> None:
    """Reference: the same parts under names of their own; along dim 0 and, for transposed layers, dim 1."""
    base = {
        "attn.in_proj_weight": drawn(0, 12, 5),
        "attn.in_proj_bias": drawn(1, 12),
        "h.c_attn.weight": drawn(2, 5, 8),
    }
    models = [{n: t + 0.1 * drawn(10 * k + t.numel(), *t.shape) for n, t in base.items()} for k in (1, 2)]
    split: dict[str, Any] = {"*in_proj*": 3, "*.c_attn.weight": [2, 1]}

    def apart(m: Model) -> Model:
        rows = {f"in{k}": t for k, t in enumerate(m["attn.in_proj_weight"].chunk(3))}
        columns = {f"c{k}": t for k, t in enumerate(m["h.c_attn.weight"].chunk(2, 1))}
        return rows | columns | {"bias": m["attn.in_proj_bias"]}

    plan = NamedConfig(name="opcm", options={"split": split})
    outcome = merge(
        models[0],
        0.5,
        [Peer("b", models[1], 0.5)],
        plan_merge(MergeConfig(method="opcm", combine=plan)),
        MergeContext(base=base),
    )
    found = apart(outcome.weights)
    expected = [plain_fold(apart(base), [apart(m) for m in order], 0.5, False)[0] for order in (models, models[::-1])]
    assert min(max(float((found[n] - e[n]).abs().max()) for n in e) for e in expected) < 1e-10
    whole = opcm(models[0], models[1:], [0.5, 0.5], base=base)["attn.in_proj_weight"]
    assert (whole - outcome.weights["attn.in_proj_weight"]).abs().max() > 1e-4
    with pytest.raises(MergeError, match=r"in_proj_weight.* 12, not 5 equal parts"):
        opcm(models[0], models[1:], [0.5, 0.5], base=base, split={"*.in_proj_weight": 5})
    with pytest.raises(MergeError, match="cannot be split along dim 2"):
        opcm(models[0], models[1:], [0.5, 0.5], base=base, split={"*.in_proj_weight": (2, 2)})
    with pytest.raises(ConfigError, match="no tensor matches 'qkv'"):
        opcm(models[0], models[1:], [0.5, 0.5], base=base, split={"qkv": 3})


def test_layouts_batch_equal_shapes_off_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the fold tensor by tensor. What a GPU does, done on the CPU: equal shapes fold together."""
    base = {f"layer{k}.weight": drawn(k, 9, 7) for k in range(5)} | {
        f"layer{k}.bias": drawn(9 + k, 9) for k in range(5)
    }
    models = [{n: t + 0.1 * drawn(100 * k + i, *t.shape) for i, (n, t) in enumerate(base.items())} for k in (1, 2, 3)]
    expected = opcm(models[0], models[1:], [0.4, 0.3, 0.3], base=base)
    seen: list[int] = []

    def together(self: FoldLayout) -> list[list[str]]:
        groups = [[n for n in self.folded if n.endswith(kind)] for kind in ("weight", "bias")]
        seen.extend(map(len, groups))
        return groups

    monkeypatch.setattr(FoldLayout, "batches", together)
    assert_close(opcm(models[0], models[1:], [0.4, 0.3, 0.3], base=base), expected, 1e-12)
    assert seen == [5, 5]


def test_errors_name_the_tensor_and_the_agent() -> None:
    """One line each: no base, not finite, missing, of another shape."""
    base, own, peer = small(0), trained(1, small(0)), trained(2, small(0))

    def fails(message: str, *args: Any, **options: Any) -> None:
        with pytest.raises(MergeError, match=message) as error:
            opcm(*args, **options)
        assert "\n" not in str(error.value)

    fails(r"'opcm' takes task vectors from a base.*merge\.base", own, [peer], [0.5, 0.5])
    for value in (torch.nan, torch.inf):
        bad = {n: torch.full_like(t, value) if n == "conv.weight" else t for n, t in peer.items()}
        fails(r"'conv\.weight' of lab-b .*not finite", own, [bad], [0.5, 0.5], base=base, names=["lab-b"])
        fails(r"'conv\.weight' of own weights .*not finite", bad, [own], [0.5, 0.5], base=base)
        fails(r"'conv\.weight' of the base .*not finite", own, [peer], [0.5, 0.5], base=bad)
        opcm(own, [peer, bad], [0.5, 0.5, 0.0], base=base)
    buffer = [m | {"running_var": torch.tensor([v])} for m, v in ((own, 1.0), (peer, torch.nan))]
    fails("buffer 'running_var' of peer 0", buffer[0], buffer[1:], [0.5, 0.5], base=base)
    fails(
        r"peer 0 has no tensor 'fc\.bias'",
        own,
        [{n: t for n, t in peer.items() if n != "fc.bias"}],
        [0.5, 0.5],
        base=base,
    )
    fails(
        r"'fc\.bias' of the base is \[2\], own \[6\]", own, [peer], [0.5, 0.5], base=base | {"fc.bias": torch.ones(2)}
    )
    fails("different names", own, [peer, peer], [0.4, 0.3, 0.3], base=base, names=["a", "a"])


def test_the_preset_in_the_pipeline() -> None:
    """`opcm` = no alignment, no repair; the pipeline hands base and model in."""
    plan = plan_merge(MergeConfig(method="opcm"))
    assert (plan.align.name, plan.combine.name, plan.repair.name) == ("none", "opcm", "none")
    outcome = merge(TASKS[0], 0.5, [Peer("b", TASKS[1], 0.5)], plan, MergeContext(base=BASE))
    assert_bits(outcome.weights, opcm(TASKS[0], [TASKS[1]], [0.5, 0.5], base=BASE))
    with pytest.raises(MergeError, match=r"merge\.base"):
        merge(TASKS[0], 0.5, [Peer("b", TASKS[1], 0.5)], plan, MergeContext())


@pytest.mark.parametrize("base", ["start", "seed"])
def test_the_preset_in_the_simulator(tmp_path: Path, base: str) -> None:
    """Equal seeds give equal bits, and the agents learn: from a base that is where they start, and from one drawn by
    its own seed."""
    table = {"file": "base.safetensors"} if base == "start" else {"seed": 0}
    config = tiny_experiment(
        tmp_path, merge={"method": "opcm", "base": table}, train__initialisation="shared", schedule__rounds=6
    )
    model = load_task(config.task, tmp_path).build_model(torch_generator(config.seed, "init"))
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    first, second = (run_simulation(config, out=tmp_path / f"run{k}") for k in range(2))
    assert first.rows == second.rows
    files = sorted((tmp_path / "run0" / "final").iterdir())
    assert len(files) == 3
    for file in files:
        assert file.read_bytes() == (tmp_path / "run1" / "final" / file.name).read_bytes()
    curve = first.after_merge()
    print(base, curve)
    assert curve[-1] > curve[0]
