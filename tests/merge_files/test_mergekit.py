"""mergekit's YAML end to end: its golden runs (mergekit 0.1.5 on a tiny Llama, float32), from folders to a folder.

The tolerance is float32's last bits, 2e-7, as for the methods themselves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from dimat.cli import main
from dimat.merge.combine.slerp import slerp
from dimat.merge.combine.ties import ties
from dimat.merge_files.mergekit import from_mergekit
from tests.merge.methods import GOLDEN, part
from tests.merge_files.models import metadata, read_model, weights, write_folder

RUNS: dict[str, dict[str, Any]] = {
    name: run["config"] for name, run in json.loads((GOLDEN / "mergekit.json").read_text())["runs"].items()
}
SHARED = [name for name, config in RUNS.items() if config["merge_method"] != "arcee_fusion"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tensors = load_file(GOLDEN / "mergekit.safetensors")
    for name in ("base", "t0", "t1", "t2"):
        write_folder(tmp_path / name, part(tensors, f"in.{name}."), shards=2 if name == "t1" else 1)
    return tmp_path


def run(config: dict[str, Any], *flags: str) -> int:
    Path("config.yml").write_text(yaml.safe_dump(config))
    return main(["merge", "--from-mergekit", "config.yml", "-o", "out", "--quiet", *flags])


@pytest.mark.parametrize("name", SHARED)
def test_golden_runs(name: str, folder: Path) -> None:
    """Same result as mergekit itself for all methods that both have."""
    assert run(RUNS[name]) == 0
    expected = part(load_file(GOLDEN / "mergekit.safetensors"), f"{name}.")
    found = read_model(Path("out"))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert float((found[key] - tensor).abs().max()) <= 2e-7 * max(1.0, float(tensor.abs().max())), key
    assert Path("out/tokenizer.json").exists()


def test_linear_normalises_its_weights(folder: Path) -> None:
    """mergekit's default: Σ w θ / Σ w; base_model may be one of the models; inputs are rounded to dtype."""
    models = [{"model": m, "parameters": {"weight": w}} for m, w in (("base", 1.0), ("t0", 3.0))]
    assert run({"merge_method": "linear", "models": models, "dtype": "bfloat16"}) == 0
    base, other = (read_model(Path(m))["lm_head.weight"].bfloat16().double() for m in ("base", "t0"))
    assert torch.equal(read_model(Path("out"))["lm_head.weight"], (base + 0.75 * (other - base)).float().bfloat16())


def test_random_methods_run_and_depend_on_the_seed_alone(folder: Path) -> None:
    """Their draws are ours, so only their laws can be compared, which the methods' own tests do."""
    models = [{"model": "base"}, *({"model": f"t{k}", "parameters": {"weight": 0.5, "density": 0.6}} for k in range(2))]
    for method in ("dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs_ties"):
        config = {"merge_method": method, "base_model": "base", "models": models}
        assert run(config, "--overwrite") == 0
        first = read_model(Path("out"))
        assert run(config, "--overwrite") == 0
        assert all(torch.equal(tensor, first[name]) for name, tensor in read_model(Path("out")).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "arcee_fusion"}, "unknown merge method 'arcee_fusion'"),
        ({"slices": [{"sources": []}]}, "models and slices cannot both be given"),
        ({"slices": [{}, {}], "models": None}, "several slices are not supported: layers stay where they are"),
        ({"slices": [{}], "models": None}, "every entry of slices has sources"),
        ({"modules": {"default": {}}}, "'modules' of mergekit is not supported; merge the whole model"),
        ({"chat_template": "chatml"}, "put the template into the merged model's folder"),
        ({"tokenizer_source": "union"}, "leave it out if all models have one vocabulary"),
        ({"tokenizer": {"source": "union"}}, "leave it out if all models have one vocabulary"),
        (
            {"models": [{"model": {"model": {"path": "t0", "lora": None}, "lora": "ad"}}]},
            "dimat merge ad --base t0 --into",
        ),
        ({"models": [{"model": "org/x+org/ad"}]}, "dimat merge org/ad --base org/x --into-base -o FOLDER"),
        ({"models": [{"model": "org/x@main"}]}, "revision 'main' of org/x: nothing is downloaded"),
        ({"models": [{"model": {"path": "t0", "override_architecture": "X"}}]}, "'override_architecture' of a model"),
        ({"models": [{"model": 3}]}, "a model is named by its path, got 3"),
        ({"merge_method": "passthrough"}, "copy a model by dimat merge MODEL -o FOLDER"),
        ({"merge_method": "karcher", "parameters": {"max_iter": 0}}, "max_iter must be a whole number of at least 1"),
        ({"merge_method": "linear", "parameters": {"normalize": False, "weight": 1}}, "takes weights of any sum"),
        (
            {
                "merge_method": "della",
                "models": [{"model": f"t{k}", "parameters": {"density": d}} for k, d in ((0, 0.5), (1, 1))],
            },
            "della with density 1 for some models only is not supported; give less for all",
        ),
        ({"parameters": {"normalise": True}}, "parameter 'normalise' of ties is not supported"),
        ({"parameters": {"rescale": True}}, "ties with rescale: true is not supported"),
        ({"parameters": {"density": "half"}}, "density of t0 is not a number"),
        ({"parameters": {"density": ["a", "b"]}}, "density: a list is of numbers (a gradient), or of tables"),
        ({"parameters": {"density": []}}, "density is an empty list"),
        ({"parameters": {"density": [{"value": 0.5, "where": "mlp"}]}}, "density: a list is of numbers"),
        ({"parameters": {"normalize": [{"value": 1}]}}, "normalize must be true or false"),
        (
            {"merge_method": "linear", "parameters": {"weight": [{"filter": "mlp", "value": 0.5}]}},
            "weight of t0 is missing for lm_head.weight",
        ),
        (
            {
                "merge_method": "breadcrumbs",
                "models": [{"model": f"t{k}", "parameters": {"gamma": k / 10}} for k in (0, 1)],
            },
            "models with their own gamma are not supported",
        ),
        ({"models": {}}, "models must be a list"),
        ({"models": [{"model": "org/name"}]}, "no model org/name: give a safetensors file or a folder (models are not"),
        ({"dtype": "float31"}, "dtype: unknown type; did you mean 'float32'"),
        ({"base_model": None}, "merges deltas from a base"),
    ],
)
def test_what_is_not_supported_is_refused(
    change: dict[str, Any], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names it; nothing is approximated."""
    config = {"merge_method": "ties", "base_model": "base", "models": [{"model": "t0"}, {"model": "t1"}], **change}
    assert run(config) in (2, 5)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path("out").exists()


@pytest.mark.parametrize("text", ["models: [", "- a", "!!python/object/apply:os.system [true]", "\x00"])
def test_files_that_are_no_configuration(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YAML is read without running anything."""
    Path("config.yml").write_text(text)
    assert main(["merge", "--from-mergekit", "config.yml", "-o", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dimat: config.yml is not")


def layered(seed: int, layers: int = 3) -> dict[str, Tensor]:
    """Tensors as a language model's files have them."""
    g = torch.Generator().manual_seed(seed)
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in ("mlp.up_proj", "self_attn.q_proj")]
    return {name: torch.randn(6, 4, generator=g) for name in names}


def test_gradients_filters_and_values_of_single_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: each tensor merged by itself with the values that mergekit's documentation gives it: a list is
    interpolated over the layers, the first value holds before and after them, the first filter that is part of
    the name counts, and a model's own value goes before the common one."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("base", 9), ("a", 0), ("b", 1)):
        write_folder(tmp_path / name, layered(seed))
    own = [{"filter": "self_attn", "value": [1, 0.5, 0.75]}, {"value": 2.0}]
    config = {
        "merge_method": "ties",
        "base_model": "base",
        "parameters": {"density": [{"filter": "mlp", "value": 0.25}], "weight": 1.0, "normalize": False},
        "models": [
            {"model": "a", "parameters": {"weight": [0.0, 1.0], "density": 0.5}},
            {"model": "b", "parameters": {"weight": own}},
        ],
    }
    assert run(config) == 0
    found = read_model(Path("out"))
    base, a, b = layered(9), layered(0), layered(1)
    depths = {"model.embed_tokens.weight": 0.0, "model.norm.weight": 0.0, "lm_head.weight": 0.0}
    attention = {0.0: 1.0, 0.5: 0.5, 1.0: 0.75}
    for name in base:
        depth = depths.get(name, 0.5 * int(name.split(".")[2]) if "layers" in name else None)
        assert depth is not None
        weights = [depth, attention[depth] if "self_attn" in name else 2.0]
        densities = [0.5, 0.25 if "mlp" in name else 1.0]
        one: list[dict[str, Tensor]] = [{name: model[name]} for model in (a, b)]
        options: dict[str, Any] = {"base": base, "density": densities, "merge_func": "sum"}
        expected = ties(one[0], one[1:], [0.5, 0.5], weights=weights, **options)[name]
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6)
    record = json.loads(metadata(Path("out/model.safetensors"))["dimat"])["recipe"]
    assert len(record["rules"]) == 6  # embedding, norm and head; mlp and attention of three layers; one is no rule


def test_slerp_with_filters_and_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form that most published configurations have."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("base", 9), ("a", 0)):
        write_folder(tmp_path / name, layered(seed, layers=5))
    t = [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "mlp", "value": [1, 0.5]}, {"value": 0.25}]
    models = [{"model": "base"}, {"model": "a"}]
    assert run({"merge_method": "slerp", "base_model": "base", "models": models, "parameters": {"t": t}}) == 0
    found, base, a = read_model(Path("out")), layered(9, 5), layered(0, 5)
    for name in base:
        layer = int(name.split(".")[2]) if "layers" in name else 0
        value = [0, 0.5, 0.3, 0.7, 1][layer] if "attn" in name else 1 - layer / 8 if "mlp" in name else 0.25
        expected = slerp({name: base[name]}, [{name: a[name]}], [0.5, 0.5], t=value)[name]
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6)


def test_where_no_model_has_weight_the_base_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros for all models; a gradient's first value outside the layers, but where a number may be a layer's."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("base", 9), ("a", 0), ("b", 1)):
        more = {name: torch.full((2,), float(seed)) for name in ("projector.weight", "tower.stages.3.weight")}
        write_folder(tmp_path / name, {**layered(seed), **more})
    weight: list[dict[str, Any]] = [{"filter": "mlp", "value": 0.5}, {"value": 0}]
    config: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "base", "parameters": {"weight": weight}}
    config["models"] = [{"model": "a"}, {"model": "b"}]
    assert run(config) == 0
    found = read_model(Path("out"))
    assert torch.equal(found["lm_head.weight"], layered(9)["lm_head.weight"])
    assert not torch.equal(found["model.layers.1.mlp.up_proj.weight"], layered(9)["model.layers.1.mlp.up_proj.weight"])
    weight[1]["value"] = [0.5, 0.25]
    assert run(config, "--overwrite") == 2
    weight.insert(0, {"filter": "tower", "value": 0.0})
    assert run(config, "--overwrite") == 0
    assert read_model(Path("out"))["projector.weight"].tolist() == [9 + 0.5 * (0 - 9) + 0.5 * (1 - 9)] * 2


def test_models_beside_the_configuration_are_found(tmp_path: Path) -> None:
    """Paths are taken from where the command runs, else from the file's folder."""
    for k in range(2):
        write_folder(tmp_path / f"m{k}", weights(k))
    models = [{"model": f"m{k}", "parameters": {"weight": 1}} for k in range(2)]
    (tmp_path / "c.yml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    assert main(["merge", "--from-mergekit", str(tmp_path / "c.yml"), "-o", str(tmp_path / "out")]) == 0


def spherical(first: Tensor, second: Tensor, t: float) -> Tensor:
    """Shoemake's formula for vectors along the last axis."""
    first, second = first.double(), second.double()
    angle = torch.acos(torch.cosine_similarity(first, second, dim=-1)).unsqueeze(-1)
    return (torch.sin((1 - t) * angle) * first + torch.sin(t * angle) * second) / torch.sin(angle)


@pytest.mark.parametrize(("row_wise", "turn"), [(False, False), (True, True), (None, False)])
def test_nuslerp_without_flattening(row_wise: bool | None, turn: bool, folder: Path) -> None:
    """mergekit's sums run over the last axis (an angle for each row of a matrix), and with nuslerp_row_wise over the
    first one (an angle for each column); a vector is one vector always."""
    parameters = {"nuslerp_flatten": False} | ({} if row_wise is None else {"nuslerp_row_wise": row_wise})
    models = [{"model": f"t{k}", "parameters": {"weight": w}} for k, w in ((0, 0.75), (1, 0.25))]
    assert run({"merge_method": "nuslerp", "models": models, "parameters": parameters}) == 0
    found, first, second = (read_model(Path(name)) for name in ("out", "t0", "t1"))
    for name, a in first.items():
        b = second[name]
        expected = spherical(a.mT, b.mT, 0.25).mT if turn and a.ndim > 1 else spherical(a, b, 0.25)
        assert float((found[name] - expected).abs().max()) <= 1e-6, name


def test_nuslerp_of_weights_that_are_zero_and_of_convolutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two weights of 0 are equal ones; rows of more than two axes are cut otherwise there."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 0), ("b", 1)):
        write_folder(
            tmp_path / name, {"conv.weight": torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed))}
        )
    models = [{"model": m, "parameters": {"weight": 0.0}} for m in ("a", "b")]
    assert run({"merge_method": "nuslerp", "models": models}) == 0
    found, a, b = (read_model(Path(name))["conv.weight"].flatten() for name in ("out", "a", "b"))
    torch.testing.assert_close(found.double(), spherical(a, b, 0.5))
    assert (
        run({"merge_method": "nuslerp", "models": models, "parameters": {"nuslerp_flatten": False}}, "--overwrite") == 2
    )


KARCHER = [1.105956306, 0.993201180, 0.730512116]
"""Facts: mergekit 0.1.5's karcher of [1, 0.5, 0], [1, 2, 0.25], [0.5, 0.25, 1.5], max_iter 10, tol 1e-5, in float64."""


def test_karcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its result, and the base is a model like the others; tol may be written as 1e-5, which YAML reads as text."""
    monkeypatch.chdir(tmp_path)
    for name, values in (("a", [1, 0.5, 0]), ("b", [1, 2, 0.25]), ("c", [0.5, 0.25, 1.5])):
        write_folder(tmp_path / name, {"w": torch.tensor(values)})
    names = ({"model": "a"}, {"model": "b"}, {"model": "c"})
    parameters = {"max_iter": 10, "tol": "1e-5"}
    assert run({"merge_method": "karcher", "models": [*names], "parameters": parameters}) == 0
    first = read_model(Path("out"))["w"]
    torch.testing.assert_close(first, torch.tensor(KARCHER), rtol=0, atol=2e-7)
    config: dict[str, Any] = {"merge_method": "karcher", "base_model": "c", "models": [*names[:2]]}
    assert run({**config, "parameters": parameters}, "--overwrite") == 0
    torch.testing.assert_close(read_model(Path("out"))["w"], first, rtol=0, atol=2e-7)


def test_karcher_written_as_people_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As text, with keys that have no value and models in tables. mergekit's defaults are 10 iterations and 1e-5."""
    monkeypatch.chdir(tmp_path)
    for name, values in (("a", [1, 0.5, 0]), ("b", [1, 2, 0.25]), ("c", [0.5, 0.25, 1.5])):
        write_folder(tmp_path / name, {"w": torch.tensor(values)})
    Path("config.yml").write_text(
        "models:\n  - model: {model: a}\n  - model: {model: b}\n  - model: {path: c}\nmerge_method: karcher\n"
        "slices: null\ntokenizer: null\nparameters: null\n"
    )
    assert main(["merge", "--from-mergekit", "config.yml", "-o", "out"]) == 0
    torch.testing.assert_close(read_model(Path("out"))["w"], torch.tensor(KARCHER), rtol=0, atol=2e-7)


def test_linear_counts_a_base_that_is_not_listed(folder: Path) -> None:
    """mergekit adds base_model to the inputs; only the methods of deltas keep it apart."""
    config: dict[str, Any] = {"merge_method": "linear", "base_model": "base", "parameters": {"weight": 1.0}}
    assert run({**config, "models": [{"model": "t0"}]}) == 0
    found, base, other = (read_model(Path(m))["lm_head.weight"].double() for m in ("out", "base", "t0"))
    torch.testing.assert_close(found, (base + other) / 2, rtol=0, atol=1e-7)


def test_forms_that_are_valid_there(folder: Path) -> None:
    """Models as tables, keys without a value, numbers as text, a slice over all layers: all the same merge."""
    own = [{"weight": 0.5, "density": 0.5}, {"weight": 0.3, "density": [0.5]}]
    plain = {"merge_method": "ties", "base_model": "base", "parameters": {"normalize": False}}
    models = [{"model": f"t{k}", "parameters": p} for k, p in enumerate(own)]
    assert run({**plain, "models": models}) == 0
    expected = read_model(Path("out"))
    tables = [{"model": {"model": {"path": f"t{k}", "revision": None}}, "parameters": p} for k, p in enumerate(own)]
    sources = [{**model, "layer_range": [0, 1]} for model in models]
    sources += [{"model": "base", "layer_range": [0, 1]}]
    empty = dict.fromkeys(("slices", "tokenizer", "tokenizer_source", "chat_template", "modules", "dtype", "other"))
    in_slice = {"sources": sources, "base_model": "base", "parameters": {"normalize": False, "weight": 9.0}}
    for config in (
        {**plain, "models": models, **empty},
        {**plain, "models": models, "slices": []},
        {**plain, "base_model": {"model": "base"}, "models": tables},
        {**plain, "models": [{"model": {"path": f"t{k}"}, "parameters": p} for k, p in enumerate(own)]},
        {**plain, "models": [{"model": {"model": f"t{k}"}, "parameters": p} for k, p in enumerate(own)], **empty},
        {"merge_method": "ties", "slices": [in_slice], "parameters": {"normalize": True}},
        {
            **plain,
            "models": models,
            "parameters": {"normalize": [False, False], "lambda": "1e+0"},
            "out_dtype": "torch.float32",
        },
    ):
        assert run(config, "--overwrite") == 0, config
        found = read_model(Path("out"))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), config
    sources[0]["layer_range"] = [0, 2]
    assert run({"merge_method": "ties", "slices": [in_slice]}, "--overwrite") == 2


def recipe_for(config: dict[str, Any]) -> dict[str, Any]:
    Path("config.yml").write_text(yaml.safe_dump(config))
    return from_mergekit(Path("config.yml"))


def test_della_has_mergekits_defaults(folder: Path) -> None:
    """normalize is true for della, false for della_linear; at density 1 nothing is dropped; what is left of a delta
    has the sum of magnitudes that it had."""
    models = [{"model": f"t{k}", "parameters": {"weight": 0.25, "density": 0.5}} for k in range(2)]
    config: dict[str, Any] = {"merge_method": "della", "base_model": "base", "models": models}
    options = recipe_for(config)["options"]
    assert (options["merge_func"], options["rescale"], options["epsilon"]) == ("mean", "norm", 0.3)
    assert recipe_for({**config, "parameters": {"rescale": False}})["options"]["rescale"] is False
    linear = recipe_for({**config, "merge_method": "della_linear"})["options"]
    assert (linear["merge_func"], linear["scaling"]) == ("linear", 1.0)
    linear = recipe_for({**config, "merge_method": "della_linear", "parameters": {"normalize": True}})["options"]
    assert linear["scaling"] == 2.0
    whole = [{"model": f"t{k}", "parameters": {"weight": 0.25}} for k in range(2)]
    found = recipe_for({**config, "models": whole})
    assert (found["method"], found["options"]["merge_func"]) == ("ties", "mean")
    assert recipe_for({**config, "merge_method": "della_linear", "models": whole})["method"] == "task-arithmetic"


@pytest.mark.parametrize("method", ["della_linear", "dare_linear"])
def test_what_is_left_of_a_delta_keeps_its_sum_of_magnitudes(method: str, folder: Path) -> None:
    """mergekit's rescale, tensor by tensor: Σ|τ| is the same before and after the drop."""
    models = [{"model": "t0", "parameters": {"weight": 1.0, "density": 0.5}}]
    assert run({"merge_method": method, "base_model": "base", "models": models}) == 0
    found, base, one = (read_model(Path(m)) for m in ("out", "base", "t0"))
    for name, start in base.items():
        before, after = ((m[name].double() - start.double()).abs() for m in (one, found))
        assert float(after.sum()) == pytest.approx(float(before.sum()), rel=1e-4), name
        assert int((after == 0).sum()) > int((before == 0).sum()), name
