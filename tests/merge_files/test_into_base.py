"""Adapters merged into their base model: W + s·B·A of every layer, dense; with PEFT itself where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dimat.cli import main
from tests.merge_files.adapters import LAYERS, PREFIX, delta, factors, read_adapter, write_adapter
from tests.merge_files.models import read_model, write_folder


def merge(*arguments: object) -> None:
    assert main(["merge", *map(str, arguments)]) == 0


def base_weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(50)
    layers = {f"{name}.weight": torch.randn(shape, generator=g).to(dtype) for name, shape in LAYERS.items()}
    return {"model.embed.weight": torch.randn(11, 8, generator=g).to(dtype), **layers, "steps": torch.tensor([3])}


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_adapter(Path("a"), factors(0))
    write_adapter(Path("b"), factors(1, 6), r=6, lora_alpha=5, use_rslora=True)
    write_folder(Path("base"), base_weights(), shards=2, config="base")


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("flags", "weights"), [((), (0.5, 0.5)), (("--weights", "0.8,0.2"), (0.8, 0.2)), (("--set", "scaling=2"), (1, 1))]
)
def test_a_whole_model_comes_out(flags: tuple[str, ...], weights: tuple[float, float]) -> None:
    """Reference: W + Σ w_k s_k B_k A_k; what no adapter touches is the base's bit for bit; config and tokenizer are
    the base's; shards as asked."""
    merge("a", "b", "--base", "base", "--into-base", "-o", "out", "--shard-size", "700B", *flags)
    found, base = read_model(Path("out")), base_weights()
    sides = [read_adapter(Path(name)) for name in "ab"]
    for layer in LAYERS:
        added = sum((w * delta(*side, layer) for w, side in zip(weights, sides)), torch.zeros(LAYERS[layer]).double())
        assert relative(found[f"{layer}.weight"], base[f"{layer}.weight"].double() + added) < 1e-7
    assert torch.equal(found["model.embed.weight"], base["model.embed.weight"])
    assert found["steps"].tolist() == [3]
    assert found.keys() == base.keys()
    names = {file.name for file in Path("out").iterdir()}
    assert {"config.json", "tokenizer.json", "README.md", "model.safetensors.index.json"} <= names
    assert "adapter_config.json" not in names
    assert json.loads(Path("out/config.json").read_text())["_name_or_path"] == "base"


@pytest.mark.parametrize("method", ["lora-svd", "lora-lego"])
def test_other_methods_add_what_their_adapter_would(method: str) -> None:
    """Reference: the adapter that the same command writes without --into-base."""
    merge("a", "b", "--method", method, "--set", "rank=3", "-o", "adapter")
    merge("a", "b", "--method", method, "--set", "rank=3", "--base", "base", "--into-base", "-o", "out")
    found, base = read_model(Path("out")), base_weights()
    for layer in LAYERS:
        expected = base[f"{layer}.weight"].double() + delta(*read_adapter(Path("adapter")), layer)
        assert relative(found[f"{layer}.weight"], expected) < 1e-6


def test_half_bases_are_rounded_once() -> None:
    """bf16 adapters and base: reference W + ΔW in float64, rounded; --dtype fp32 writes it wide."""
    write_adapter(Path("h"), factors(0, dtype=torch.bfloat16))
    save_file(base_weights(torch.bfloat16), "half.safetensors")
    merge("h", "--base", "half.safetensors", "--into-base", "-o", "out.safetensors")
    merge("h", "--base", "half.safetensors", "--into-base", "-o", "wide.safetensors", "--dtype", "fp32")
    base = base_weights(torch.bfloat16)
    for layer in LAYERS:
        exact = base[f"{layer}.weight"].double() + delta(*read_adapter(Path("h")), layer)
        assert torch.equal(load_file("out.safetensors")[f"{layer}.weight"], exact.to(torch.bfloat16))
        assert relative(load_file("wide.safetensors")[f"{layer}.weight"], exact) < 1e-7


def test_kernels_embeddings_transposed_layers_biases_and_whole_modules() -> None:
    """PEFT's layouts: a kernel's product in the kernel's shape; an embedding's and a (in, out) layer's transposed; B's
    bias on the layer's; modules_to_save in the place of the base's."""
    g = torch.Generator().manual_seed(0)
    shapes = {
        "conv.weight": (4, 3, 2, 2),
        "conv.bias": (4,),
        "embed.weight": (11, 8),
        "c_attn.weight": (8, 24),
        "square.weight": (5, 5),
        "head.weight": (3, 6),
        "head.bias": (3,),
    }
    base = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    tensors = {
        PREFIX + name: torch.randn(shape, generator=g)
        for name, shape in {
            "conv.lora_A.weight": (2, 3, 2, 2),
            "conv.lora_B.weight": (4, 2, 1, 1),
            "conv.lora_B.bias": (4,),
            "embed.lora_embedding_A": (2, 11),
            "embed.lora_embedding_B": (8, 2),
            "c_attn.lora_A.weight": (2, 8),
            "c_attn.lora_B.weight": (24, 2),
            "square.lora_A.weight": (2, 5),
            "square.lora_B.weight": (5, 2),
            "head.weight": (3, 6),
            "head.base_layer.bias": (3,),
        }.items()
    }
    save_file(base, "b.safetensors")
    config = {"r": 2, "lora_alpha": 6, "fan_in_fan_out": True, "modules_to_save": ["head"], "lora_bias": True}
    write_adapter(Path("x"), tensors, **config)
    merge("x", "--base", "b.safetensors", "--into-base", "-o", "o.safetensors")
    found, part = load_file("o.safetensors"), {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    kernel = (part["conv.lora_B.weight"].flatten(1) @ part["conv.lora_A.weight"].flatten(1)).view(4, 3, 2, 2)
    expected = {
        "conv.weight": base["conv.weight"] + 3 * kernel,
        "conv.bias": base["conv.bias"] + 3 * part["conv.lora_B.bias"],
        "embed.weight": base["embed.weight"] + 3 * (part["embed.lora_embedding_B"] @ part["embed.lora_embedding_A"]).T,
        "c_attn.weight": base["c_attn.weight"] + 3 * (part["c_attn.lora_B.weight"] @ part["c_attn.lora_A.weight"]).T,
        "square.weight": base["square.weight"] + 3 * (part["square.lora_B.weight"] @ part["square.lora_A.weight"]).T,
        "head.weight": part["head.weight"],
        "head.bias": part["head.base_layer.bias"],
    }
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


def test_dry_run_tells_of_the_base(capsys: pytest.CaptureFixture[str]) -> None:
    merge("a", "b", "--base", "base", "--into-base", "-o", "out", "--dry-run")
    told = capsys.readouterr().out
    assert "method   lora-concat" in told
    assert "base     base, into which the adapters are merged" in told
    assert "tensors  5" in told
    assert not Path("out").exists()


def test_a_recipe_says_it_too() -> None:
    Path("r.toml").write_text('models = ["a", "b"]\nbase = "base"\ninto_base = true\nout = "one"\n')
    merge("r.toml")
    merge("a", "b", "--base", "base", "--into-base", "-o", "two")
    one, two = read_model(Path("one")), read_model(Path("two"))
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["a", "b", "--into-base"], 2, "needs the adapters' base model: give it with --base"),
        (["a", "b", "--into-base", "--base", "a"], 2, "needs the adapters' base model"),
        (["base", "--into-base", "--base", "base"], 2, "merges PEFT adapter folders, and these models are not"),
        (["a", "--into-base", "--base", "base", "--method", "average"], 2, "method 'average' would merge the factors"),
        (["a", "--into-base", "--base", "less"], 5, "the base less has no tensor 'model.layers.1.q_proj.weight'"),
        (["a", "--into-base", "--base", "other"], 5, "has 'model.layers.0.q_proj.weight' as F32[3, 3], the adapters'"),
        (["a", "--into-base", "--base", "packed"], 5, "as U8[12, 10], quantised: nothing can be added to it"),
        (["a", "--into-base", "--base", "bad"], 5, "'model.layers.0.q_proj.weight' holds 120 values that are not"),
        (["a", "base", "--into-base", "--base", "base"], 2, "base is not a PEFT adapter folder"),
    ],
)
def test_bad_input(arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, a stable exit code, nothing written."""
    weights, name = base_weights(), "model.layers.0.q_proj.weight"
    write_folder(Path("less"), {key: tensor for key, tensor in weights.items() if "layers.1" not in key})
    for folder, tensor in (
        ("other", torch.zeros(3, 3)),
        ("packed", torch.zeros(12, 10).byte()),
        ("bad", torch.full((12, 10), torch.nan)),
    ):
        write_folder(Path(folder), {**weights, name: tensor})
    assert main(["merge", *arguments, "-o", "no"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path("no").exists()


def test_peft_reads_and_computes_the_same() -> None:
    """Reference: PEFT's own files, loader, delta weights and merge_and_unload, where it is installed."""
    peft = pytest.importorskip("peft")

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 6, bias=False), "conv": nn.Conv2d(3, 4, 3)})

    def save(folder: str, seed: int, **config: object) -> None:
        model = peft.get_peft_model(network(), peft.LoraConfig(target_modules=["q", "v", "conv"], **config))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.3)
        model.save_pretrained(folder)

    def deltas(folder: str) -> dict[str, Tensor]:
        model = peft.PeftModel.from_pretrained(network(), folder)
        layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
        return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}

    save("x", 1, r=4, lora_alpha=8)
    save("y", 2, r=3, lora_alpha=5, use_rslora=True, rank_pattern={"conv": 5}, alpha_pattern={"v": 7})
    merge("x", "y", "--method", "lora-concat", "--weights", "0.6,0.4", "-o", "merged")
    one, two, found = deltas("x"), deltas("y"), deltas("merged")
    assert one.keys() == found.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 0.6 * one[name] + 0.4 * two[name], rtol=1e-5, atol=1e-6)
    save_file(network().state_dict(), "net.safetensors")
    merge("x", "y", "--base", "net.safetensors", "--into-base", "--weights", "0.6,0.4", "-o", "whole.safetensors")
    whole = peft.PeftModel.from_pretrained(network(), "merged").merge_and_unload().state_dict()
    for name, tensor in load_file("whole.safetensors").items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-6)
