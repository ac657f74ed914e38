"""Folders as they are met: stale indices, caches, other formats, quantised weights, tokens in another order.

References: what transformers 5 reads of such a folder (its loading order, and buffers that it passes over), and the
tensors written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dimat.cli import main
from tests.merge_files.models import read_model, weights, write_folder

Fails = Callable[..., str]
FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    def check(*arguments: object) -> str:
        assert main(["merge", *map(str, arguments), "-o", "no"]) in (2, 5)
        (line,) = capsys.readouterr().err.splitlines()
        assert not Path("no").exists()
        return line

    return check


def merge(*arguments: object) -> dict[str, Tensor]:
    assert main(["merge", *map(str, arguments), "-o", "out", "--overwrite", "--quiet"]) == 0
    return read_model(Path("out"))


def language_model(seed: int, rows: int = 8, **more: Tensor) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    names = ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight")
    return {name: torch.randn(rows, 4, generator=g) for name in names} | more


def folder(name: str, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    Path(name).mkdir()
    save_file(dict(tensors), Path(name, "model.safetensors"))
    Path(name, "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return Path(name)


def test_shards_without_their_index_are_told(fails: Fails) -> None:
    """transformers reads none of these: one shard is no model, and nothing says what lies in which."""
    for name, left in (("all", 2), ("one", 1)):
        write_folder(Path(name), weights(0), shards=2)
        Path(name, "model.safetensors.index.json").unlink()
        for shard in sorted(Path(name).glob("*.safetensors"))[left:]:
            shard.unlink()
        assert f"{name} has {left} of 2 shards and no model.safetensors.index.json" in fails(name, name)


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
@pytest.mark.parametrize("vocabulary", ["tokenizer.json", "vocab.json"])
def test_tokens_that_are_added_beside_a_vocabulary_count(file: str, vocabulary: str, fails: Fails) -> None:
    """transformers puts them behind the vocabulary, in the rows that the file names."""
    for name, token in (("a", "<x>"), ("b", "<y>"), ("c", "<x>")):
        folder(name, language_model(0))
        ids = {letter: row for row, letter in enumerate("abcdefg")}
        text = {"model": {"vocab": ids}, "added_tokens": []} if vocabulary == "tokenizer.json" else ids
        Path(name, vocabulary).write_text(json.dumps(text))
        added: Any = {token: 7} if file == "added_tokens.json" else {"added_tokens_decoder": {"7": {"content": token}}}
        Path(name, file).write_text(json.dumps(added))
    assert "b has other tokens than a: 7 is '<x>' there, '<y>' here" in fails("a", "b")
    merge("a", "c")


def test_a_whole_file_goes_before_shards() -> None:
    """transformers takes model.safetensors where there is one, whatever an index beside it says."""
    write_folder(Path("a"), weights(0), shards=2)
    save_file(weights(1), "a/model.safetensors")
    assert torch.equal(merge("a")["embed.weight"], weights(1)["embed.weight"])


def test_shards_are_read_by_what_they_hold(fails: Fails) -> None:
    """A stale index names a tensor's old shard, or not at all; a tensor that no shard has is missing."""
    write_folder(Path("a"), weights(0), shards=2)
    index = Path("a/model.safetensors.index.json")
    tree = json.loads(index.read_text())
    files = sorted({*tree["weight_map"].values()})
    tree["weight_map"] = {n: files[f == files[0]] for n, f in tree["weight_map"].items() if n != "norm.weight"}
    index.write_text(json.dumps(tree))
    found = merge("a")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(0).items())
    tree["weight_map"]["gone"] = files[0]
    index.write_text(json.dumps(tree))
    assert "the index has tensor 'gone' in model-00001-of-00002.safetensors, which does not hold it" in fails("a")


def test_a_config_names_the_file() -> None:
    write_folder(Path("a"), weights(0))
    save_file(weights(1), "a/other.safetensors")
    Path("a/config.json").write_text('{"transformers_weights": "other.safetensors"}')
    assert torch.equal(merge("a")["norm.weight"], weights(1)["norm.weight"])


@pytest.mark.parametrize("named", ["hub/models--org--x", "hub/models--org--x/snapshots"])
def test_a_cache_root_is_its_snapshot(named: str, fails: Fails) -> None:
    """refs/main says which of several; the cache of many models names one that could be meant."""
    root = Path("hub/models--org--x")
    for k in range(2):
        (root / "snapshots").mkdir(parents=True, exist_ok=True)
        write_folder(root / f"snapshots/{k}{k}", weights(k))
    assert "2 snapshots and no main: name one of them" in fails(named)
    (root / "refs").mkdir()
    (root / "refs/main").write_text("11\n")
    assert torch.equal(merge(named)["norm.weight"], weights(1)["norm.weight"])
    assert "is a Hugging Face cache of 1 models: name one, e.g. models--org--x" in fails("hub")


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"GGUF\x03\0\0\0", "is GGUF, llama.cpp's format: take the model that it was made from"),
        (b"\x89HDF\r\n", "is HDF5"),
        (b"PK\x03\x04", "is a zip archive, as torch.save"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS"),
        (b"<!DOCTYPE html>", "is a web page"),
    ],
)
def test_other_formats_are_named(start: bytes, message: str, fails: Fails) -> None:
    Path("a.gguf").write_bytes(start + bytes(100))
    assert message in fails("a.gguf")
    Path("b").mkdir()
    Path("b/model.safetensors").write_bytes(start + bytes(100))
    assert message in fails("b")


def test_a_folder_of_another_format(fails: Fails) -> None:
    Path("b").mkdir()
    Path("b/x.Q4.gguf").write_bytes(b"GGUF")
    assert "b has weights as GGUF files" in fails("b")


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (
            {"l.weight": torch.ones(2, 2)},
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "(gptq, 4 bits)",
        ),
        ({"l.qweight": torch.ones(2, 2).int(), "l.s": torch.ones(2)}, {}, "'l.qweight' is I32[2, 2]"),
        ({"l.weight": torch.ones(2, 2).char(), "l.SCB": torch.ones(2)}, {}, "is quantised: tensor"),
        (
            {"l.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "l.weight_scale_inv": torch.ones(1)},
            {},
            "weight_scale_inv",
        ),
        ({"e.up_blocks": torch.ones(2, 2).byte(), "e.up_scales": torch.ones(2).byte()}, {}, "is quantised"),
        ({"l.weight": torch.ones(2, 2).int()}, {}, "a weight as integer codes"),
    ],
)
def test_quantised_weights_are_refused(
    tensors: dict[str, Tensor], config: dict[str, Any], message: str, fails: Fails
) -> None:
    """Never averaged code by code, as a model or as the base."""
    folder("a", tensors, **config)
    line = fails("a")
    assert line.startswith("dimat: a is quantised")
    assert message in line
    assert "dequantise" in line
    save_file(weights(0), "b.safetensors")
    assert "a is quantised" in fails("b.safetensors", "--base", "a", "--method", "ties")


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        ({"num_attention_heads": 4}, {"num_attention_heads": 8}, "num_attention_heads is 4 in a, 8 in b"),
        (
            {"num_attention_heads": 4},
            {"num_attention_heads": 4, "num_key_value_heads": 2},
            "num_key_value_heads is 4 in a",
        ),
        ({}, {"rope_theta": 1e6}, "rope_theta is 10000.0 in a, 1000000.0 in b"),
        (
            {"rope_theta": 1e6},
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            "1000000.0 in a, 500000.0",
        ),
        ({"encoder_attention_heads": 2}, {"encoder_attention_heads": 4}, "encoder_attention_heads is 2 in a, 4 in b"),
        ({"norm_num_groups": 8}, {"norm_num_groups": 16}, "norm_num_groups is 8 in a, 16 in b"),
        ({"global_rope_theta": 1e4}, {"global_rope_theta": 1e5}, "global_rope_theta is 10000.0 in a"),
        ({"feed_forward_proj": "gated-gelu"}, {"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-gelu'"),
        ({}, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling is left out in a, {'rope_type'"),
        ({}, {"rope_scaling": "x"}, "rope_scaling is left out in a, 'x' in b"),
        ({"rope_scaling": "x"}, {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling is 'x' in a, {'rope_type'"),
        ({"rope_theta": "1e6"}, {"rope_theta": 1e6}, "rope_theta is '1e6' in a, 1000000.0 in b"),
        ({"rope_theta": True}, {"rope_theta": 1.0}, "rope_theta is True in a, 1.0 in b"),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": 1}, "tie_word_embeddings is True in a, 1 in b"),
        ({"layer_types": ["a", 1]}, {"layer_types": ["a", True]}, "layer_types is ['a', 1] in a, ['a', True] in b"),
        ({"text_config": {"hidden_act": "silu"}}, {"text_config": "x"}, "text_config is a table in a, 'x' in b"),
        ({"id2label": ["cat", "dog"]}, {"id2label": {0: "cat", 1: "dog"}}, "id2label is ['cat', 'dog'] in a, a table"),
        ({"id2label": ["cat", "dog"]}, {"id2label": ["dog", "cat"]}, "class 0 is 'cat' in a, 'dog' in b"),
        ({"rms_norm_eps": 1e-5}, {"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-05 in a, 1e-06 in b"),
        ({"text_config": {"hidden_act": "silu"}}, {"text_config": {"hidden_act": "gelu"}}, "text_config.hidden_act"),
        ({"id2label": {0: "cat", 1: "dog"}}, {"id2label": {0: "dog", 1: "cat"}}, "class 0 is 'cat' in a, 'dog' in b"),
        ({"label2id": {"cat": 0, "dog": 1}}, {"label2id": {"cat": 1, "dog": 0}}, "class 0 is 'cat' in a, 'dog' in b"),
        ({"id2label": {0: "cat", 1: "dog"}}, {"label2id": {"dog": 0, "cat": 1}}, "class 0 is 'cat' in a, 'dog' in b"),
    ],
)
def test_configs_that_compute_differently(one: dict[str, Any], two: dict[str, Any], message: str, fails: Fails) -> None:
    folder("a", weights(0), **one)
    folder("b", weights(1), **two)
    line = fails("a", "b")
    assert "the models compute differently, 1 difference: " in line
    assert message in line


SIZES = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 20}


def test_settings_of_what_is_off_do_not_count() -> None:
    """As Qwen2.5's base and instruct models differ, none of which slides a window."""
    folder("a", weights(0), use_sliding_window=False, sliding_window=131072, max_window_layers=28)
    folder("b", weights(1), use_sliding_window=False, sliding_window=32768, max_window_layers=21)
    merge("a", "b")


@pytest.mark.parametrize(
    ("one", "two", "part"),
    [
        ({"model": {"vocab": {"a": 0}, "merges": ["a b"]}}, {"model": {"vocab": {"a": 0}, "merges": [["a", "b"]]}}, ""),
        ({"model": {"vocab": {"a": 0}, "merges": ["a b"]}}, {"model": {"vocab": {"a": 0}, "merges": []}}, "merges"),
        (
            {"model": {"vocab": {"a": 0}}, "normalizer": {"type": "Lowercase"}},
            {"model": {"vocab": {"a": 0}}},
            "normalizer",
        ),
        ({"model": {"vocab": [["a", -1.0]]}}, {"model": {"vocab": [["a", -2.0]]}}, "scores"),
    ],
)
def test_tokenizers_that_cut_otherwise_are_told(
    one: dict[str, Any], two: dict[str, Any], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, tree in (("a", one), ("b", two)):
        folder(name, weights(0))
        Path(name, "tokenizer.json").write_text(json.dumps(tree))
    assert main(["merge", "a", "b", "-o", "out"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "note: tokenizers: b cuts text" in line]
    assert [line.partition("is written: ")[2] for line in told] == (
        [f"{part} of tokenizer.json differ"] if part else []
    )


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        ({}, {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-06 in a, 1e-05 in b"),
        ({}, {"rms_norm_eps": 1e-6}, ""),
        ({"model_type": "mixtral"}, {"model_type": "mixtral", "rope_theta": 1e4}, "rope_theta is 1000000.0 in a"),
        ({"model_type": "mixtral"}, {"model_type": "mixtral", "rope_theta": 1e6}, ""),
        ({}, {"model_type": "gemma"}, "model_type is 'llama' in a, 'gemma' in b"),
        ({}, {"model_type": "mistral"}, "sliding_window is left out in a, 4096 in b"),
        ({}, {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 4}, ""),
        ({"model_type": "ours", "hidden_act": "gelu"}, {"model_type": "ours"}, ""),
    ],
)
def test_keys_that_are_left_out_have_the_defaults_of_the_architecture(
    one: dict[str, Any], two: dict[str, Any], message: str, fails: Fails
) -> None:
    """Reference: the configuration classes of transformers; what an architecture of their own is like, nobody knows."""
    pytest.importorskip("transformers")
    folder("a", weights(0), **(SIZES | one))
    folder("b", weights(1), **(SIZES | two))
    if message:
        assert message in fails("a", "b")
    else:
        merge("a", "b")


def test_llama_and_mistral_compute_alike() -> None:
    """That their weights may be merged rests on this: of the same tensors and settings, the same outputs."""
    from dimat.tasks.huggingface.library import library
    from tests.symmetry.zoo import _torchvision_models as torchvision_models

    torchvision_models()  # if an earlier test loaded transformers, it fails with a torchvision of another build
    hf: Any = library("transformers")
    sizes = SIZES | {"intermediate_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 2}
    llama = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).eval()
    mistral = hf.MistralForCausalLM(hf.MistralConfig(**sizes, sliding_window=None)).eval()
    mistral.load_state_dict(llama.state_dict())
    ids = torch.randint(0, 20, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(mistral(ids).logits, llama(ids).logits)


def test_configs_that_may_differ(capsys: pytest.CaptureFixture[str]) -> None:
    """How a model was trained or is run does not matter; keys that nobody knows are told, and merged."""
    folder("a", weights(0), rope_theta=1e6, torch_dtype="float32", use_cache=True, id2label={0: "LABEL_0"}, novel=1)
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    folder("b", weights(1), rope_parameters=rope, dtype="bfloat16", id2label={0: "cat"}, attention_dropout=0.1, novel=2)
    assert main(["merge", "a", "b", "-o", "out"]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert notes == ["note: config.json: novel is 1 in a, 2 in b"]


def test_numbers_are_equal_whatever_way_they_are_written() -> None:
    """Writers of JSON differ in 8 and 8.0, which transformers reads alike."""
    folder(
        "a", weights(0), num_attention_heads=8, time_step_limit=[0, float("inf")], query_pre_attn_scalar=float("nan")
    )
    folder(
        "b",
        weights(1),
        num_attention_heads=8.0,
        time_step_limit=[0.0, float("inf")],
        query_pre_attn_scalar=float("nan"),
    )
    merge("a", "b")


def tokens(name: str, ids: dict[str, int], kind: str = "tokenizer.json") -> None:
    tree: Any = {"model": {"vocab": ids}, "added_tokens": []} if kind == "tokenizer.json" else ids
    Path(name, kind).write_text(json.dumps(tree))


ORDER = [0, 7, 6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.json"])
def test_tokens_in_another_order(kind: str, fails: Fails) -> None:
    """The same model with its rows and tokens in another order merges with itself to itself, once they are aligned."""
    one = language_model(0)
    two = {name: t if "layers" in name else t[ORDER] for name, t in one.items()}
    folder("a", one, vocab_size=8)
    folder("b", two, vocab_size=8)
    tokens("a", {f"w{i}": i for i in range(8)}, kind)
    tokens("b", {f"w{k}": i for i, k in enumerate(ORDER)}, kind)
    line = fails("a", "b")
    assert "b has the tokens of a in another order: 'w1' is 1 there, 7 here; --align-vocabulary" in line
    for first, second, rows in (("a", "b", one), ("b", "a", two)):
        found = merge(first, second, "--align-vocabulary")
        assert all(torch.equal(found[name], tensor) for name, tensor in rows.items())
        assert Path("out", kind).read_text() == Path(first, kind).read_text()
    found = merge("a", "--base", "b", "--method", "task-arithmetic", "--align-vocabulary")
    assert all(torch.allclose(found[name], tensor) for name, tensor in two.items())  # the base's tokenizer is written
    assert Path("out", kind).read_text() == Path("b", kind).read_text()


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.json"])
def test_two_tokens_of_one_id(kind: str, fails: Fails, capsys: pytest.CaptureFixture[str]) -> None:
    """They share a row, which is merged and told; by such tokens no rows can be brought into one order."""
    for name in "ab":
        folder(name, language_model(0), vocab_size=8)
        tokens(name, {f"w{i}": i for i in range(8)} | ({"again": 3, "more": 4} if name == "b" else {}), kind)
    assert main(["merge", "b", "b", "-o", "out"]) == 0
    told = "b gives the id 3 to two tokens, 'w3' and 'again', and 1 more tokens an id that is another's: the merged row"
    assert told in capsys.readouterr().err
    assert "b has other tokens than a: 3 is 'w3' there, 'again' here" in fails("a", "b")
    assert "the tokenizer of b gives the id 3 to two tokens" in fails("a", "b", "--align-vocabulary")
    tokens("b", {f"w{i}": i for i in range(7)} | {"w7": -1}, kind)
    assert "gives 'w7' the id -1, no row" in fails("a", "b", "--align-vocabulary")


def test_other_tokens(fails: Fails, capsys: pytest.CaptureFixture[str]) -> None:
    """Another token in a row is refused; tokens that one has more of, in rows that are free, are told."""
    for name in "abc":
        folder(name, language_model(0), vocab_size=8)
    tokens("a", {f"w{i}": i for i in range(6)})
    tokens("b", {f"w{i}": i for i in range(5)} | {"other": 5})
    tokens("c", {f"w{i}": i for i in range(7)})
    assert "b has other tokens than a: 5 is 'w5' there, 'other' here" in fails("a", "b")
    assert "b and a have 1 and 1 tokens that the other lacks" in fails("a", "b", "--align-vocabulary")
    assert main(["merge", "a", "c", "-o", "out"]) == 0
    assert "tokens only in c: 1, only in a: 0; their rows" in capsys.readouterr().err
    folder("d", language_model(0))
    assert "d is not a model folder with a tokenizer" in fails("a", "d", "--align-vocabulary")


FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_buffers_that_follow_from_the_config(order: str) -> None:
    """Old files hold rotary frequencies, new ones do not; transformers passes over them. Own's stay as they are."""
    folder("a", language_model(0) | {FREQUENCIES: torch.tensor([1.0, 0.1])})
    folder("b", language_model(1))
    found = merge(*order)
    assert (FREQUENCIES in found) == (order == "ab")
    name = "lm_head.weight"
    torch.testing.assert_close(found[name], (language_model(0)[name] + language_model(1)[name]) / 2)


@pytest.mark.parametrize("method", ["average", "dare-linear", "dare-ties"])
@pytest.mark.parametrize(("first", "second"), [("twice", "once"), ("once", "twice"), ("twice", "twice")])
def test_a_tied_head_stored_once_or_twice(first: str, second: str, method: str) -> None:
    """lm_head is the embedding: it stays so under methods that draw at random, and own's file says what is written."""
    for name, seed, how in (("a", 0, first), ("b", 1, second), ("base", 2, "once")):
        tensors = language_model(seed)
        del tensors["lm_head.weight"]
        if how == "twice":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        folder(name, tensors, tie_word_embeddings=True)
    found = merge("a", "b", "--method", method, *(["--base", "base"] if method != "average" else []))
    assert ("lm_head.weight" in found) == (first == "twice")
    assert torch.equal(
        found.get("lm_head.weight", found["model.embed_tokens.weight"]), found["model.embed_tokens.weight"]
    )


def test_a_head_that_only_one_model_has_of_its_own(fails: Fails) -> None:
    """An untied head is merged with the other's embedding where it is written, and is not lost where it would be."""
    folder("a", language_model(0))
    tied = language_model(1)
    del tied["lm_head.weight"]
    folder("b", tied)
    name = "lm_head.weight"
    torch.testing.assert_close(merge("a", "b")[name], (language_model(0)[name] + tied["model.embed_tokens.weight"]) / 2)
    assert "(tied), and a separate weight in a; merge with a first" in fails("b", "a")
    Path("b/config.json").write_text('{"tie_word_embeddings": false}')
    assert "'lm_head.weight' is missing from b" in fails("a", "b")
