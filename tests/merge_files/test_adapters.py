"""PEFT adapter folders merged as products: reference is ΔW = s·B·A of the written files, by PEFT's rules of scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from dimat.cli import main
from dimat.merge import product_methods
from dimat.merge.registry import combine_registry
from dimat.merge_files.peft import read_settings
from tests.merge_files.adapters import LAYERS, PREFIX, delta, factors, read_adapter, write_adapter

V = "model.layers.0.v_proj"
Q1 = "model.layers.1.q_proj"


def merge(*arguments: object) -> None:
    assert main(["merge", *map(str, arguments)]) == 0


@pytest.fixture(autouse=True)
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """a, of rank 4; b, of rank 8 with rsLoRA and patterns; c, of rank 2 on one layer."""
    monkeypatch.chdir(tmp_path)
    write_adapter(Path("a"), factors(0))
    write_adapter(
        Path("b"),
        factors(1, 8, ranks={Q1: 2}),
        r=8,
        lora_alpha=16,
        use_rslora=True,
        rank_pattern={Q1: 2},
        alpha_pattern={V: 3},
    )
    write_adapter(Path("c"), factors(2, 2, {V: LAYERS[V]}), r=2, target_modules=["v_proj"])


def deltas(folder: str) -> dict[str, Tensor]:
    tensors, config = read_adapter(Path(folder))
    return {layer: delta(tensors, config, layer) for layer in LAYERS}


def mean(*folders: str, weights: tuple[float, ...]) -> dict[str, Tensor]:
    found = [deltas(folder) for folder in folders]
    return {layer: sum((w * d[layer] for w, d in zip(weights, found)), 0 * found[0][layer]) for layer in LAYERS}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_concat_is_exact_whatever_ranks_and_scales() -> None:
    """The written files have the mean of the read files' deltas; ranks add up, module by module."""
    merge("a", "b", "c", "--method", "lora-concat", "--weights", "0.5,0.3,0.2", "-o", "out")
    expected = mean("a", "b", "c", weights=(0.5, 0.3, 0.2))
    assert all(relative(found, expected[layer]) < 1e-6 for layer, found in deltas("out").items())
    tensors, config = read_adapter(Path("out"))
    assert [tensors[f"{PREFIX}{layer}.lora_A.weight"].shape[0] for layer in LAYERS] == [12, 14, 6]
    assert config["r"] == 14
    assert config["rank_pattern"] == {"model.layers.0.q_proj": 12, Q1: 6}
    assert {p.name for p in Path("out").iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(("order", "rank"), [("abc", 4), ("bac", 8), ("cab", 2)])
def test_svd_keeps_owns_ranks_and_settings(order: str, rank: int) -> None:
    """Reference: truncated SVD of the dense mean; alpha, rsLoRA and patterns are own's; a module that own lacks has
    the largest rank that others have for it."""
    merge(*order, "--method", "lora-svd", "--weights", "0.5,0.3,0.2", "-o", "out")
    expected = mean(*order, weights=(0.5, 0.3, 0.2))
    tensors, config = read_adapter(Path("out"))
    _, own = read_adapter(Path(order[0]))
    for layer in LAYERS:
        found = tensors[f"{PREFIX}{layer}.lora_A.weight"].shape[0]
        has = layer in own["rank_pattern"] or order[0] != "c" or layer == V
        assert found == (own["rank_pattern"].get(layer, rank) if has else {"model.layers.0.q_proj": 8, Q1: 4}[layer])
        u, s, v = torch.linalg.svd(expected[layer], full_matrices=False)
        assert relative(delta(tensors, config, layer), (u[:, :found] * s[:found]) @ v[:found]) < 1e-6
    same = ["lora_alpha", "use_rslora", "alpha_pattern", "lora_dropout", "task_type", "base_model_name_or_path"]
    assert {key: config[key] for key in same} == {key: own[key] for key in same}


def test_factors_are_merged_with_what_stands_beside_them(capsys: pytest.CaptureFixture[str]) -> None:
    """The file of an adapter is the adapter: b's scale is not a's. Where no settings are, that is said."""
    merge("a/adapter_model.safetensors", "b/adapter_model.safetensors", "--method", "lora-concat", "-o", "out")
    assert all(relative(deltas("out")[n], t) < 1e-6 for n, t in mean("a", "b", weights=(0.5, 0.5)).items())
    for name in ("a", "b"):
        save_file(factors(0), f"{name}.safetensors")
    capsys.readouterr()
    merge("a.safetensors", "b.safetensors", "--method", "lora-svd", "-o", "out.safetensors")
    assert "note: factors of LoRA without an adapter_config.json beside them" in capsys.readouterr().err


def test_another_rank() -> None:
    """--set rank: at most what the adapters of a module have together; of a single adapter, it compresses it."""
    merge("a", "b", "c", "--method", "lora-svd", "--set", "rank=9", "-o", "out")
    tensors, config = read_adapter(Path("out"))
    assert [tensors[f"{PREFIX}{layer}.lora_A.weight"].shape[0] for layer in LAYERS] == [9, 9, 6]
    assert (config["r"], config["rank_pattern"]) == (9, {Q1: 6})
    expected = mean("a", "b", "c", weights=(1 / 3, 1 / 3, 1 / 3))
    assert relative(deltas("out")[Q1], expected[Q1]) < 1e-6  # all ranks are kept
    merge("a", "--method", "lora-svd", "--set", "rank=1", "-o", "small")
    u, s, v = torch.linalg.svd(deltas("a")[V], full_matrices=False)
    assert relative(deltas("small")[V], s[0] * u[:, :1] @ v[:1]) < 1e-6
    assert read_adapter(Path("small"))[1]["r"] == 1


def test_lego_is_the_library_s_on_adapters_of_one_scale() -> None:
    """Reference: the combine method on the factors, which have the same scale in both files."""
    write_adapter(Path("d"), factors(7))
    merge("a", "d", "--method", "lora-lego", "--weights", "0.7,0.3", "-o", "out")
    expected = combine_registry.call("lora-lego", {}, factors(0), [factors(7)], [0.7, 0.3])
    found, config = read_adapter(Path("out"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert config == read_adapter(Path("a"))[1]


def test_lego_of_modules_that_some_adapters_lack() -> None:
    """Reference: the combine method on factors with each file's scale in B, of nothing where a file has none: units of
    those that have some are clustered, and nobody's strength is halved by those that have not."""
    merge("a", "b", "c", "--method", "lora-lego", "--weights", "0.5,0.3,0.2", "-o", "out")
    found = deltas("out")
    for layer in LAYERS:
        whole = [deltas(folder)[layer] for folder in "abc"]
        models: list[dict[str, Tensor]] = []
        for folder in "abc":
            tensors, config = read_adapter(Path(folder))
            a, b = (tensors.get(f"{PREFIX}{layer}.lora_{side}.weight") for side in "AB")
            if a is None or b is None:
                models.append(
                    {
                        "x.lora_A.weight": torch.zeros(1, whole[0].shape[1]),
                        "x.lora_B.weight": torch.zeros(len(whole[0]), 1),
                    }
                )
                continue
            at = int((b @ a).abs().argmax())
            scale = float(delta(tensors, config, layer).flatten()[at] / (b @ a).flatten()[at])
            models.append({"x.lora_A.weight": a, "x.lora_B.weight": scale * b})
        merged = combine_registry.call("lora-lego", {}, models[0], models[1:], [0.5, 0.3, 0.2])
        expected = merged["x.lora_B.weight"] @ merged["x.lora_A.weight"]
        assert relative(found[layer], expected) < 1e-5
    assert (deltas("c")[Q1].norm(), found[Q1].norm() > 0.5 * deltas("a")[Q1].norm()) == (0, True)


@pytest.mark.parametrize("method", product_methods())
def test_weight_one_on_an_adapter_gives_its_files_bit_for_bit(method: str) -> None:
    """Tensors and settings; modules that only others have do not come in."""
    for folder, weights in (("a", "1,0,0"), ("b", "1,0,0"), ("c", "1,0,0")):
        others = [other for other in "abc" if other != folder]
        merge(folder, *others, "--method", method, "--weights", weights, "-o", "out", "--overwrite")
        tensors, config = read_adapter(Path(folder))
        found, written = read_adapter(Path("out"))
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        assert written == config


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    share=st.floats(0.01, 0.99),
    ranks=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    alphas=st.tuples(st.floats(0.1, 64), st.floats(-64, -0.1)),
    rslora=st.tuples(st.booleans(), st.booleans()),
)
def test_property_any_scales(
    share: float, ranks: tuple[int, int], alphas: tuple[float, float], rslora: tuple[bool, bool]
) -> None:
    """lora-concat and an SVD of full rank have the exact mean; order, rank, alpha and rsLoRA do not matter."""
    for k, name in enumerate("xy"):
        settings_ = {"r": ranks[k], "lora_alpha": alphas[k], "use_rslora": rslora[k]}
        write_adapter(Path(name), factors(k + 5, ranks[k]), **settings_)
    expected = mean("x", "y", weights=(share, 1 - share))
    for flags in (["--method", "lora-concat"], ["--method", "lora-svd", "--set", f"rank={sum(ranks)}"]):
        merge("x", "y", *flags, "--weights", f"{share!r},{1 - share!r}", "-o", "out", "--overwrite", "--quiet")
        for layer, found in deltas("out").items():
            scale = max(d[layer].norm() for d in (deltas("x"), deltas("y")))
            assert (found - expected[layer]).norm() < 1e-6 * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_stay_unless_another_is_asked_for(dtype: torch.dtype) -> None:
    """Reference: the mean in float64. Adapters of two types merge; --dtype writes wide."""
    write_adapter(Path("h"), factors(0, dtype=dtype))
    merge("h", "b", "--method", "lora-svd", "--set", "rank=12", "-o", "out")
    expected = mean("h", "b", weights=(0.5, 0.5))
    assert {tensor.dtype for tensor in read_adapter(Path("out"))[0].values()} == {dtype}
    assert all(relative(found, expected[layer]) < 4 * torch.finfo(dtype).eps for layer, found in deltas("out").items())
    merge("h", "b", "--method", "lora-svd", "--set", "rank=12", "-o", "wide", "--dtype", "fp32")
    assert all(relative(found, expected[layer]) < 1e-6 for layer, found in deltas("wide").items())


def test_names_of_a_living_model_and_other_tensors() -> None:
    """`lora_A.default.weight` is the same module; modules_to_save and biases are averaged; B's bias counts times its
    scale; embeddings and kernels keep their shapes."""

    def tensors(seed: int, rank: int, dot: str) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        shapes = {
            f"{PREFIX}q.lora_A{dot}.weight": (rank, 5),
            f"{PREFIX}q.lora_B{dot}.weight": (6, rank),
            f"{PREFIX}q.lora_B{dot}.bias": (6,),
            f"{PREFIX}conv.lora_A{dot}.weight": (rank, 3, 2, 2),
            f"{PREFIX}conv.lora_B{dot}.weight": (4, rank, 1, 1),
            f"{PREFIX}embed.lora_embedding_A{dot}": (rank, 11),
            f"{PREFIX}embed.lora_embedding_B{dot}": (8, rank),
            f"{PREFIX}head.weight": (3, 6),
            f"{PREFIX}q.bias": (6,),
        }
        return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}

    one, two = tensors(0, 2, ""), tensors(1, 3, ".default")
    write_adapter(Path("x"), one, r=2, lora_alpha=4, modules_to_save=["head"], bias="all", lora_bias=True)
    write_adapter(Path("y"), two, r=3, lora_alpha=3, modules_to_save=["head"], bias="all", lora_bias=True)
    merge("x", "y", "--method", "lora-concat", "-o", "out")
    found, config = read_adapter(Path("out"))
    assert found.keys() == one.keys()
    assert config["r"] == 5
    scale = 4 / 5
    for name in ("head.weight", "q.bias"):
        torch.testing.assert_close(found[PREFIX + name], (one[PREFIX + name] + two[PREFIX + name]) / 2)
    bias = (2 * one[f"{PREFIX}q.lora_B.bias"] + two[f"{PREFIX}q.lora_B.default.bias"]) / 2
    torch.testing.assert_close(scale * found[f"{PREFIX}q.lora_B.bias"], bias)
    for a, b in (("q.lora_A{}.weight", "q.lora_B{}.weight"), ("conv.lora_A{}.weight", "conv.lora_B{}.weight")):
        products = [
            part[PREFIX + b.format(dot)].flatten(1) @ part[PREFIX + a.format(dot)].flatten(1)
            for part, dot in ((one, ""), (two, ".default"), (found, ""))
        ]
        torch.testing.assert_close(scale * products[2], products[0] + products[1] / 2)
    assert found[f"{PREFIX}conv.lora_A.weight"].shape == (5, 3, 2, 2)
    assert found[f"{PREFIX}embed.lora_embedding_A"].shape == (5, 11)


def test_targets() -> None:
    """Modules that are chosen alike stay chosen so; else they are named one by one."""
    merge("a", "b", "--method", "lora-svd", "-o", "alike")
    assert read_adapter(Path("alike"))[1]["target_modules"] == ["q_proj", "v_proj"]
    write_adapter(Path("e"), factors(3), target_modules=["v_proj", "q_proj"])
    merge("a", "e", "--method", "lora-svd", "-o", "ordered")
    assert read_adapter(Path("ordered"))[1]["target_modules"] == ["q_proj", "v_proj"]
    write_adapter(Path("f"), factors(3), target_modules=r".*(q|v)_proj", layers_to_transform=None)
    merge("a", "f", "--method", "lora-svd", "-o", "named")
    assert read_adapter(Path("named"))[1]["target_modules"] == sorted(LAYERS)


def test_patterns_are_regular_expressions_of_name_ends(tmp_path: Path) -> None:
    """As PEFT has them: the first pattern that a module's name ends in; ^ for whole names."""
    table = {r"layers\.[01]\.q": 2, "^q": 3, "v": 5}
    write_adapter(tmp_path / "p", factors(0), r=7, lora_alpha=6, rank_pattern=table, alpha_pattern={"m.v": 1})
    found = read_settings(tmp_path / "p")
    modules = {"model.layers.1.q": 2, "layers.0.q": 2, "q": 3, "x.q": 7, "m.v": 5, "mv": 7, "layers.2.q": 7}
    assert {module: found.rank_of(module) for module in modules} == modules
    assert [found.scale_of(module, 4) for module in ("m.v", "x.m.v", "v")] == [0.25, 0.25, 1.5]


def test_rules() -> None:
    """A method and weights for some modules; the rest by the recipe's."""
    Path("r.toml").write_text(
        'models = ["a", "b"]\nmethod = "lora-concat"\nout = "out"\n[[rules]]\nmatch = "*v_proj*"\n'
        'method = "lora-svd"\nweights = [0.0, 1.0]\noptions = { rank = 2 }\n'
    )
    merge("r.toml")
    expected = mean("a", "b", weights=(0.5, 0.5))
    u, s, v = torch.linalg.svd(deltas("b")[V], full_matrices=False)
    found = deltas("out")
    assert relative(found[V], (u[:, :2] * s[:2]) @ v[:2]) < 1e-6
    assert relative(found[Q1], expected[Q1]) < 1e-6


def test_dry_run_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks, and other base models; factor by factor, the advice to merge products."""
    write_adapter(Path("e"), factors(3), base_model_name_or_path="org/other")
    merge("a", "b", "e", "--method", "lora-concat", "-o", "out", "--dry-run")
    told = capsys.readouterr().out
    assert "ranks    10, 16, of 3 modules" in told
    assert "note: the adapters name different base models: org/base, org/other" in told
    merge("a", "e", "-o", "out", "--dry-run")
    assert "for that take --method lora-svd" in capsys.readouterr().out
    assert not Path("out").exists()
    merge("a", "e", "-o", "out")
    told = capsys.readouterr().err
    assert "note: the adapters name different base models: org/base, org/other" in told
    assert "note: adapters: factors are merged one by one" in told


def test_provenance(capsys: pytest.CaptureFixture[str]) -> None:
    """The record of what was merged is written as for other models."""
    merge("a", "b", "--method", "lora-svd", "--set", "rank=3", "-o", "out", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["options"] == {"rank": 3}
    assert report["inputs"].keys() == {"a", "b"}
    assert "`lora-svd`, `rank` = 3" in Path("out/README.md").read_text()


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    capsys.readouterr()
    assert main(["merge", *map(str, arguments), "-o", "no"]) == code
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert not Path("no").exists()
    assert told.out == ""
    return line


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; products are merged only for LORA adapters"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_dora": True}, "use_dora is set, the adapter is DoRA"),
        ({"target_parameters": ["experts.w"]}, "target_parameters is set"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights is 'pissa_niter_4', which moves a part of the base",
        ),
        ({"r": 0}, "r must be a rank of at least 1, got 0"),
        ({"r": "4"}, "r must be a rank of at least 1, got '4'"),
        ({"r": True}, "r must be a rank"),
        ({"r": None}, "r must be a rank"),
        ({"lora_alpha": 0}, "lora_alpha must be a number other than 0, got 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number"),
        ({"lora_alpha": [1]}, "lora_alpha must be a number"),
        ({"rank_pattern": [2]}, "rank_pattern must be a table of modules, got [2]"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern has '(', which is not a pattern"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern['q_proj'] must be a rank"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern['q_proj'] must be a number"),
        (
            {"r": 5},
            "the rank of 'base_model.model.model.layers.0.q_proj' is 5, but its lora_A is F32[4, 10]",
        ),
        ({"rank_pattern": {"v_proj": 3}}, "v_proj' is 3, but its lora_A is F32[4, 10]"),
    ],
)
def test_settings_that_do_not_fit(config: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line with the file, exit code 5, nothing written."""
    write_adapter(Path("bad"), factors(5), **config)
    line = fails(capsys, 5, "a", "bad", "--method", "lora-svd")
    assert message in line
    assert line.startswith("dimat: bad/adapter_config.json: ")


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_damaged_settings(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapter(Path("bad"), factors(5))
    Path("bad/adapter_config.json").write_text(text)
    assert "bad/adapter_config.json is not" in fails(capsys, 5, "a", "bad", "--method", "lora-svd")


A, B = (f"{PREFIX}{V}.lora_{side}.weight" for side in "AB")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({A: None}, f"bad: tensor {B!r} is a LoRA factor without its lora_A"),
        ({B: None}, f"bad: tensor {A!r} is a LoRA factor without its lora_B"),
        ({B: torch.zeros(6, 3)}, f"bad: {A!r} F32[4, 10] and {B!r} F32[6, 3] have no product B·A"),
        ({A: torch.zeros(4)}, f"bad: {A!r} is F32[4], which is not a LoRA factor"),
        ({A: torch.zeros(4, 10).int()}, f"bad: {A!r} is I32[4, 10], which is not a LoRA factor"),
        ({A: torch.zeros(4, 9)}, f"1 difference: {A!r} is F32[4, 10] in a, F32[4, 9] in bad"),
        ({B: torch.zeros(7, 4)}, f"1 difference: {B!r} is F32[6, 4] in a, F32[7, 4] in bad"),
        ({f"{PREFIX}{V}.lora_magnitude_vector": torch.ones(6)}, "lora_magnitude_vector' is not of plain LoRA"),
        ({"head.weight": torch.ones(6)}, "1 difference: 'head.weight' is only in bad"),
        ({"x.lora_B.bias": torch.ones(6)}, "'x.lora_B.bias' is a bias of factors that are missing"),
        (
            {"x.lora_A.mine.weight": torch.ones(4, 2), "x.lora_B.mine.weight": torch.ones(2, 4)},
            "tensor 'x.lora_A.mine.weight' is of a named adapter",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    change: dict[str, Tensor | None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {name: tensor for name, tensor in {**factors(5), **change}.items() if tensor is not None}
    write_adapter(Path("bad"), tensors)
    assert message in fails(capsys, 5, "a", "bad", "--method", "lora-svd")


def test_other_faults(capsys: pytest.CaptureFixture[str]) -> None:
    """What a command asks for that adapters cannot give."""
    write_adapter(Path("none"), {"head.weight": torch.ones(2)})
    write_adapter(Path("nan"), {name: t.fill_(torch.nan) if name == A else t for name, t in factors(1).items()})
    write_adapter(Path("r4"), factors(6))
    (Path("model")).mkdir()
    Path("model/model.safetensors").write_bytes(Path("a/adapter_model.safetensors").read_bytes())
    svd = ["--method", "lora-svd"]
    assert "none has no LoRA factors" in fails(capsys, 5, "none", "none", *svd)
    assert f"tensor {A!r} holds 40 values that are not finite" in fails(capsys, 5, "a", "nan", *svd)
    assert "option rank = 17 is more than the 12 that the adapters" in fails(capsys, 2, "a", "b", *svd, "--set=rank=17")
    assert "rank: Input should be greater than" in fails(capsys, 2, "a", "b", *svd, "--set=rank=0").replace("'", "")
    assert "model is not a PEFT adapter folder" in fails(capsys, 2, "a", "model", *svd)
    assert "take no base" in fails(capsys, 2, "a", "b", *svd, "--base", "model")
    assert "adapters differ in 'r': 4 in a, 8 in b; merge their products with --method lora-svd" in fails(
        capsys, 5, "a", "b"
    )
    assert main(["merge", "a", "b", *svd, "-o", "no.safetensors"]) == 2
    assert "a merged adapter is a folder" in capsys.readouterr().err
    rules = 'models = ["a", "r4"]\nmethod = "lora-svd"\n[[rules]]\nmatch = "*lora_A*"\nweights = [1.0, 0.0]\n'
    Path("parted.toml").write_text(rules)
    assert "a rule separates the factors of" in fails(capsys, 2, "parted.toml")
    Path("mixed.toml").write_text(
        rules.replace("*lora_A*", "*v_proj*").replace("weights", 'method = "average"\nweights')
    )
    assert "method 'average' would merge the factors of" in fails(capsys, 2, "mixed.toml")
    Path("deaf.toml").write_text(
        'models = ["a", "c"]\nmethod = "lora-svd"\n[[rules]]\nmatch = "*q_proj*"\nweights=[0, 1]'
    )
    assert "no model that has" in fails(capsys, 2, "deaf.toml")


TRAINED: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], str]] = {
    "LOHA": ({}, {"hada_w1_a": (6, 2), "hada_w1_b": (2, 6)}, "its trained parts multiply each other"),
    "LOKR": ({}, {"lokr_w1": (2, 2), "lokr_w2": (3, 3)}, "its trained parts multiply each other"),
    "ADALORA": ({}, {"lora_A": (2, 6), "lora_B": (6, 2), "lora_E": (2, 1)}, "its trained parts multiply each other"),
    "VERA": ({}, {"vera_lambda_b": (6,), "vera_lambda_d": (2,)}, "its trained parts multiply each other"),
    "OFT": ({}, {"oft_R.weight": (2, 3)}, "the mean of rotations is not a rotation"),
    "NOVEL": ({}, {"novel": (2, 3)}, "dimat does not know whether"),
    "FOURIERFT": ({"random_loc_seed": 1}, {"fourierft_spectrum": (9,)}, "differ in 'random_loc_seed': 1 in x, 2 in y"),
    "SHIRA": ({"random_seed": 1}, {"shira_weight": (9,)}, "differ in 'random_seed': 1 in x, 2 in y"),
    "IA3": ({"feedforward_modules": ["q"]}, {"ia3_l": (6, 1)}, "differ in 'feedforward_modules': ['q'] in x, [] in y"),
}
"""Kinds of adapters: settings, what they train, and what is said of two that cannot be merged."""


@pytest.mark.parametrize("kind", TRAINED)
def test_other_kinds_are_averaged_or_refused(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """References: the mean, where a layer changes in proportion to what is trained and that acts at the same places;
    else the reason."""
    settings_, shapes, message = TRAINED[kind]
    trained: list[dict[str, Tensor]] = []

    def write(name: str, seed: int, **config: Any) -> None:
        g = torch.Generator().manual_seed(seed)
        trained.append({f"{PREFIX}{V}.{key}": torch.randn(shape, generator=g) for key, shape in shapes.items()})
        Path(name).mkdir()
        save_file(trained[-1], f"{name}/adapter_model.safetensors")
        Path(name, "adapter_config.json").write_text(json.dumps({"peft_type": kind, **config}))

    write("x", 0, **settings_)
    write("z", 1, **settings_)
    other = {key: [] if isinstance(value, list) else value + 1 for key, value in settings_.items()}
    write("y", 1, **other)
    assert main(["merge", "x", "y", "-o", "out"]) == 5
    assert message in capsys.readouterr().err
    if settings_:
        merge("x", "z", "-o", "out")
        found, _ = read_adapter(Path("out"))
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, (trained[0][name] + trained[1][name]) / 2)
    else:
        assert main(["merge", "x", "z", "-o", "out"]) == 5


def test_concat_of_modules_that_only_a_later_adapter_has() -> None:
    """Own's factors are of rank 0 there; those of the others are kept, not own's empty ones."""
    write_adapter(Path("q"), factors(3, 4, {Q1: LAYERS[Q1]}))
    merge("q", "c", "--method", "lora-concat", "--weights", "0.75,0.25", "-o", "out")
    expected = mean("q", "c", weights=(0.75, 0.25))
    found = deltas("out")
    assert all(relative(found[layer], expected[layer]) < 1e-6 for layer in (V, Q1))
    tensors, _ = read_adapter(Path("out"))
    assert [tensors[f"{PREFIX}{layer}.lora_A.weight"].shape[0] for layer in (V, Q1)] == [2, 4]


@pytest.mark.parametrize("use_dora", [True, False])
@pytest.mark.parametrize("method", ["average", "slerp", "lora-svd"])
def test_dora_is_never_merged_factor_by_factor(method: str, use_dora: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Its magnitudes scale the base's weights too, whether the config says so or the tensors' names."""
    for k in range(2):
        magnitudes = {f"{PREFIX}{layer}.lora_magnitude_vector": torch.ones(LAYERS[layer][0]) for layer in LAYERS}
        write_adapter(Path(f"d{k}"), factors(k) | magnitudes, use_dora=use_dora)
    assert main(["merge", "d0", "d1", "--method", method, "-o", "out"]) == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert "DoRA" in line or "lora_magnitude_vector' is not of plain LoRA" in line
    assert "into its base model" in line
    assert not Path("out").exists()
