"""`dimat merge` on real files: what it writes is what `merge_weights` returns, in every layout (issue C)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dimat import __version__, merge_weights
from dimat.cli import main
from dimat.merge import combine_registry
from dimat.merge.tensors.streaming import MergedWeights
from dimat.registry import keywords
from tests.merge.methods import Counted, assert_same_bits
from tests.merge_files.models import metadata, read_model, weights, write_folder

WANTED = {"aux", "data", "observer"}
"""What methods may ask for that is in no model's file."""
METHODS = [name for name in combine_registry.names() if not WANTED & keywords(combine_registry.get(name)).keys()]
TWO_MODELS = {"slerp", "nuslerp"}


def merge(*arguments: object) -> None:
    assert main(["merge", *map(str, arguments)]) == 0


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A single file, a sharded folder, a folder with one file, and (last) a base."""
    monkeypatch.chdir(tmp_path)
    save_file(weights(0), tmp_path / "a.safetensors")
    write_folder(tmp_path / "b", weights(1), shards=3)
    write_folder(tmp_path / "c", weights(2), config="mistral")
    write_folder(tmp_path / "base", weights(3), config="base")
    return [Path("a.safetensors"), Path("b"), Path("c"), Path("base")]


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_file_is_what_merge_weights_returns(method: str, models: list[Path]) -> None:
    """Every method, bit for bit; random ones with the same seed."""
    count = 2 if method in TWO_MODELS else 3
    mixing = [0.6, 0.4] if count == 2 else [0.5, 0.3, 0.2]
    arguments = ["--method", method, "--base", models[-1], "--weights", ",".join(map(str, mixing)), "--seed", 5]
    merge(*models[:count], *arguments, "-o", "out.safetensors")
    expected = merge_weights(
        weights(0),
        [weights(k) for k in range(1, count)],
        mixing,
        method="average",
        combine=method,
        base=weights(3),
        generator=torch.Generator().manual_seed(5),
        screen={"max_norm_ratio": 1e6},
    )
    assert_same_bits(read_model(Path("out.safetensors")), expected)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ties", {"trim": "vector", "density": 0.3}),
        ("krum", {"m": 2}),
        ("emr", {}),
        ("pcb-merging", {"ratio": 0.5}),
        ("opcm", {}),
    ],
)
def test_methods_that_read_the_whole_model_first_hand_on_tensor_by_tensor(
    method: str, options: dict[str, Any], models: list[Path]
) -> None:
    """Global thresholds and norms are those of the whole model, and yet no method holds it."""
    flags = [f"--set={key}={json.dumps(value)}" for key, value in options.items()]
    merge(*models[:3], "--method", method, "--base", models[-1], *flags, "-o", "out", "--shard-size", "600B")
    expected = merge_weights(
        weights(0),
        [weights(1), weights(2)],
        [1 / 3] * 3,
        method="average",
        combine={"name": method, "options": options},
        base=weights(3),
    )
    assert_same_bits(read_model(Path("out")), expected)


@pytest.mark.parametrize("method", METHODS)
def test_methods_merge_a_tensor_when_it_is_asked_for(method: str) -> None:
    """No method holds merged tensors, also where own has all the weight: each is made, alike whenever it is asked for,
    from the models' tensors of that name alone."""
    for mixing in ([0.5, 0.5], [1.0, 0.0]):
        own, peer = Counted(weights(0)), Counted(weights(1))
        merged = combine_registry.call(
            method,
            {},
            own,
            [peer],
            mixing,
            base=weights(3),
            generator=torch.Generator().manual_seed(0),
            put_away=torch.clone,
        )
        assert isinstance(merged, MergedWeights)
        assert [*merged] == [*weights(0)]
        for name in merged:
            own.reads.clear()
            peer.reads.clear()
            first = merged[name]
            assert {*own.reads, *peer.reads} == {name}
            assert torch.equal(merged[name], first)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    share=st.floats(0, 1),
    density=st.floats(0.05, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shard=st.integers(1, 3000),
)
def test_property_any_weights_density_type_and_shard_size(
    share: float, density: float, dtype: torch.dtype, shard: int, tmp_path: Path
) -> None:
    """TIES from files equals TIES on state dicts, however the output is cut into shards."""
    for name, seed in (("a", 0), ("b", 1), ("base", 3)):
        save_file(weights(seed, dtype), tmp_path / f"{name}.safetensors")
    mixing = [share, 1 - share]
    flags = ["--method", "ties", "--set", f"density={density!r}", "--weights", f"{mixing[0]!r},{mixing[1]!r}"]
    inputs = [tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--base", tmp_path / "base.safetensors"]
    merge(*inputs, *flags, "-o", tmp_path / "out", "--shard-size", shard, "--overwrite")
    expected = merge_weights(
        weights(0, dtype),
        [weights(1, dtype)],
        mixing,
        method="average",
        combine={"name": "ties", "options": {"density": density}},
        base=weights(3, dtype),
    )
    assert_same_bits(read_model(tmp_path / "out"), expected)


def test_shards_hold_no_more_than_asked_and_every_tensor_once(models: list[Path]) -> None:
    """Hugging Face's layout: shards named by number, an index with all names and the total size."""
    merge(*models[:2], "-o", "out", "--shard-size", "700B")
    index = json.loads(Path("out/model.safetensors.index.json").read_text())
    files = sorted(Path("out").glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) > 1
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights(0).values())
    for file in files:
        held = read_model(file)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 700


def test_config_and_tokenizer_are_the_bases_else_the_first_folders(models: list[Path]) -> None:
    """Issue C: copied from the base; the type in config.json is that of the merged weights."""
    merge(*models[:3], "--method", "task-arithmetic", "--base", "base", "-o", "with", "--dtype", "bf16")
    merge(*models[:3], "-o", "without")
    config = json.loads(Path("with/config.json").read_text())
    assert config == {"model_type": "llama", "_name_or_path": "base", "torch_dtype": "bfloat16"}
    assert json.loads(Path("without/config.json").read_text())["_name_or_path"] == "llama"
    assert Path("with/tokenizer.json").read_text() == '{"of": "base"}'


def test_provenance_is_in_the_metadata_and_on_the_card(models: list[Path]) -> None:
    """Recipe, blake3 of every input file, version."""
    merge(*models[:2], "--weights", "0.75,0.25", "-o", "out")
    record = json.loads(metadata(Path("out/model.safetensors"))["dimat"])
    assert metadata(Path("out/model.safetensors"))["format"] == "pt"
    assert record["version"] == __version__
    assert [model["weight"] for model in record["recipe"]["models"]] == [0.75, 0.25]
    digest = blake3(Path("a.safetensors").read_bytes()).hexdigest()
    assert record["inputs"]["a.safetensors"] == {"a.safetensors": digest}
    assert len(record["inputs"]["b"]) == 3
    card = Path("out/README.md").read_text()
    assert card.startswith("---\ntags:\n")
    assert digest in card
    assert "| `a.safetensors` | 0.75 |" in card


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "float64"])
def test_output_types(dtype: str, tmp_path: Path) -> None:
    """Half models written wide are merged wide: their exact average, not that of rounded sums. Integers stay."""
    for k in range(2):
        save_file(weights(k, torch.bfloat16), tmp_path / f"{k}.safetensors")
    merge(tmp_path / "0.safetensors", tmp_path / "1.safetensors", "-o", tmp_path / "out.safetensors", "--dtype", dtype)
    exact = (weights(0, torch.bfloat16)["norm.weight"].double() + weights(1, torch.bfloat16)["norm.weight"]) / 2
    found = read_model(tmp_path / "out.safetensors")
    assert torch.equal(found["norm.weight"], exact.to(found["norm.weight"].dtype))
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(dtype, dtype)
    assert str(found["norm.weight"].dtype) == f"torch.{short}"
    assert found["steps"].tolist() == [0, 7]


@pytest.mark.parametrize(("read", "written"), [("bf16", None), ("fp16", "fp32"), ("fp64", "bf16"), ("fp32", "fp64")])
def test_input_types(read: str, written: str | None, models: list[Path]) -> None:
    """Tensors are rounded to the type as they are read, the base's too; what is written is of that type, or of
    `dtype`. Reference: the rounded tensors merged in float64."""
    flags = ["--input-dtype", read, *(["--dtype", written] if written else [])]
    merge(*models[:2], "--method", "task-arithmetic", "--base", "base", "--set", "scaling=2.0", *flags, "-o", "out")
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
    own, peer, base = (weights(k)["embed.weight"].to(kinds[read]).double() for k in (0, 1, 3))
    found = read_model(Path("out"))["embed.weight"]
    assert found.dtype == kinds[written or read]
    exact = base + (own - base) + (peer - base)
    narrow = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(found.dtype, 1e-6)
    assert float((found.double() - exact).abs().max()) <= narrow * float(exact.abs().max())
    assert read_model(Path("out"))["steps"].tolist() == [0, 7]
    name = str(kinds[written or read]).removeprefix("torch.")
    assert json.loads(Path("out/config.json").read_text())["torch_dtype"] == name


def test_values_that_the_input_type_cannot_hold(models: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """1e6 is infinite in fp16: an error that says so, and nothing is written."""
    save_file({**weights(1), "scale": torch.tensor(1e6)}, "large.safetensors")
    arguments = ["a.safetensors", "large.safetensors", "--input-dtype", "fp16", "-o", "out"]
    assert main(["merge", *arguments]) == 5
    assert "tensor 'scale' holds 1 values that are not finite in F16" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_recipe_with_rules(models: list[Path]) -> None:
    """The first rule that matches counts; paths are relative to the recipe; a flag wins over the file."""
    Path("sub").mkdir()
    Path("sub/recipe.toml").write_text(
        """
method = "task-arithmetic"
base = "../base"
out = "merged.safetensors"
models = [{ path = "../a.safetensors", weight = 0.5 }, { path = "../b", weight = 0.5 }]
options = { scaling = 2.0 }
[[rules]]
match = "*.bias"
method = "average"
weights = [0.25, 0.75]
[[rules]]
regex = "layers\\\\.\\\\d+"
options = { scaling = 0.5 }
"""
    )
    merge("sub/recipe.toml")
    own, peer, base = weights(0), weights(1), weights(3)
    found = read_model(Path("sub/merged.safetensors"))

    def expected(name: str, scaling: float) -> torch.Tensor:
        return base[name] + scaling * ((own[name] + peer[name]) / 2 - base[name])

    bias = "layers.0.mlp.bias"
    assert torch.allclose(found[bias], own[bias] + 0.75 * (peer[bias] - own[bias]), atol=1e-6)
    assert torch.allclose(found["layers.0.mlp.weight"], expected("layers.0.mlp.weight", 0.5), atol=1e-6)
    assert torch.allclose(found["norm.weight"], expected("norm.weight", 2.0), atol=1e-6)
    merge("sub/recipe.toml", "-o", "average.safetensors", "--weights", "1,0")
    rest = read_model(Path("average.safetensors"))
    assert torch.equal(rest["norm.weight"], own["norm.weight"])


def test_a_rule_without_method_keeps_the_recipes(models: list[Path]) -> None:
    """Rules' weights alone: one layer is taken from the second model."""
    Path("r.toml").write_text('models = ["a.safetensors", "b"]\n[[rules]]\nmatch = "embed.*"\nweights = [0.0, 1.0]\n')
    merge("r.toml", "-o", "o.safetensors")
    found = read_model(Path("o.safetensors"))
    assert torch.equal(found["embed.weight"], weights(1)["embed.weight"])
    assert torch.allclose(found["norm.weight"], (weights(0)["norm.weight"] + weights(1)["norm.weight"]) / 2)


def test_statistics_for_fisher_come_from_files(models: list[Path]) -> None:
    """`statistics` of [[models]] are what `merge_weights` takes as aux."""
    fishers = [{"fisher.norm.weight": torch.rand(8)} for _ in range(2)]
    for k, fisher in enumerate(fishers):
        save_file(fisher, f"f{k}.safetensors")
    Path("r.toml").write_text(
        """
method = "fisher"
[[models]]
path = "a.safetensors"
statistics = "f0.safetensors"
[[models]]
path = "b"
statistics = "f1.safetensors"
"""
    )
    merge("r.toml", "-o", "o.safetensors")
    expected = merge_weights(weights(0), [weights(1)], [0.5, 0.5], method="average", combine="fisher", aux=fishers)
    assert_same_bits(read_model(Path("o.safetensors")), expected)


def test_adapters_are_merged_like_plain_tensors(tmp_path: Path) -> None:
    """PEFT folders in, a PEFT folder out, with the adapter's config."""
    for k in range(2):
        folder = tmp_path / f"lora{k}"
        folder.mkdir()
        tensors = {"base_model.model.q.lora_A.weight": torch.full((2, 4), float(k)), "b": torch.full((4, 2), 2.0 * k)}
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    merge(tmp_path / "lora0", tmp_path / "lora1", "-o", tmp_path / "out")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert torch.equal(read_model(tmp_path / "out")["b"], torch.ones(4, 2))
    (tmp_path / "lora1" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 8}')
    assert main(["merge", str(tmp_path / "lora0"), str(tmp_path / "lora1"), "-o", str(tmp_path / "no")]) == 5


def test_dry_run_tells_and_writes_nothing(models: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Models, tensors, bytes, method, memory; `--json` as one object on stdout."""
    before = sorted(Path().iterdir())
    arguments = [*map(str, models[:3]), "--method", "opcm", "--base", "base", "-o", "out", "--dry-run"]
    merge(*arguments)
    told = capsys.readouterr()
    assert told.err == ""
    for part in ("opcm", "a.safetensors", "weight 0.333333", "6, ", "base", "besides mapped files", "MB"):
        assert part in told.out
    merge(*arguments, "--json")
    plan = json.loads(capsys.readouterr().out)
    assert plan["tensors"] == 6
    assert plan["bytes"] == sum(t.nbytes for t in weights(0).values())
    assert plan["files"] == ["model.safetensors"]
    assert plan["peak_memory"] > 3e8
    assert sorted(Path().iterdir()) == before


def test_json_report_and_no_bar_where_there_is_no_terminal(
    models: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Machine output on stdout alone; stderr has no control characters."""
    merge(*models[:2], "-o", "out", "--json")
    told = capsys.readouterr()
    assert json.loads(told.out)["inputs"].keys() == {"a.safetensors", "b"}
    assert told.err == ""
    merge(*models[:2], "-o", "out2")
    assert capsys.readouterr().err == f"wrote out2: 6 tensors, {sum(t.nbytes for t in weights(0).values()):,} bytes\n"


def test_overwriting_keeps_what_is_not_the_models(models: list[Path]) -> None:
    """Old shards and index go, notes stay; an empty folder needs no --overwrite."""
    Path("out").mkdir()
    merge(*models[:2], "-o", "out", "--shard-size", "600B")
    Path("out/notes.md").write_text("mine")
    merge(*models[:2], "-o", "out", "--overwrite")
    names = {f.name for f in Path("out").iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json", "README.md", "notes.md"}
    assert [p for p in Path().iterdir() if p.name.startswith(".")] == []
