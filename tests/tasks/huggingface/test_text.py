"""Causal language modelling with transformers' models. References: the documents that files were written from, the
tokenizer called directly, and transformers' own loss."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dimat.config import TaskConfig, TrainConfig
from dimat.errors import ConfigError, DataError
from dimat.seeds import torch_generator
from dimat.symmetry import derive_symmetry, tolerance_of, verify_symmetry
from dimat.tasks import Task, load_task
from dimat.train import Trainer
from dimat.train.check_task import check_task
from tests.tasks.huggingface.samples import GPT2, LLAMA, grouped, sentences, write_text, write_tokenizer


def made(folder: Path, **options: Any) -> Any:
    data = {"name": "text.txt", "tokenizer": "bytes", "max_length": 32}
    tree = grouped({"data": data, "model": {"config": GPT2}, "probe": {"count": 4}}, options)
    return load_task(TaskConfig(name="hf-causal-lm", options=tree), folder)


def everything(data: Any) -> torch.Tensor:
    return data.batch(torch.arange(len(data))).inputs[0]


def test_documents_are_packed_into_blocks(tmp_path: Path) -> None:
    """All bytes of all documents come once, an end mark after each, in blocks of one length; the rest is left out."""
    texts = write_text(tmp_path / "text.txt", 40)
    (tmp_path / "test.txt").write_text("\n\n".join(texts[:5]), encoding="utf-8")
    task = made(tmp_path, data={"test": "test.txt"})
    assert isinstance(task, Task)
    stream = [byte for text in texts for byte in [*text.encode(), 256]]
    expected = torch.tensor(stream[: len(stream) // 32 * 32]).reshape(-1, 32)
    blocks = torch.cat([everything(task.data("train")), everything(task.data("probe"))])
    assert len(task.data("probe")) == 4
    assert sorted(blocks.tolist()) == sorted(expected.tolist())
    ordered = [row for row in expected.tolist() if row in everything(task.data("train")).tolist()]
    assert everything(task.data("train")).tolist() == ordered
    held = [byte for text in texts[:5] for byte in [*text.encode(), 256]]
    assert everything(task.data("test")).flatten().tolist() == held[: len(held) // 32 * 32]


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=lambda c: c["model_type"])
def test_loss_and_metrics_are_those_of_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    """The loss is the model's own with labels; perplexity is its exponential over the whole set; equal seeds give
    equal models; permuting the derived groups leaves the logits."""
    write_text(tmp_path / "text.txt")
    task = made(tmp_path, model={"config": config})
    one, same, other = (task.build_model(torch_generator(seed, "init")) for seed in (0, 0, 1))
    weights, again, others = (model.state_dict() for model in (one, same, other))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert any(not torch.equal(weights[name], others[name]) for name in weights)
    ids = everything(task.data("test"))
    one.eval()
    with torch.no_grad():
        outputs = one(ids)
        expected = one(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(task.loss(outputs, ids), expected)
        metrics = task.metrics(outputs, ids)
        hits = (outputs.logits.argmax(-1)[:, :-1] == ids[:, 1:]).float().mean(1)
    assert torch.equal(metrics["token_accuracy"], hits)
    settings = TrainConfig.model_validate({"device": "cpu", "eval_batch_size": 7})
    trainer = Trainer(task, task.data("train"), settings, seed=0)
    found = trainer.evaluate(task.data("test"))
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-5)
    assert (task.metric, made(tmp_path, metric="perplexity").metric) == ("token_accuracy", "perplexity")
    check_task(made(tmp_path, metric="perplexity"), settings)  # a metric of the whole set may be the one that counts
    spec = derive_symmetry(one, task.example_inputs())
    assert spec.groups
    error = verify_symmetry(one, spec, task.example_inputs(), torch_generator(0, "verify"))
    assert error <= tolerance_of(one, spec, task.example_inputs())


def test_training_learns_and_goes_on_from_a_state(tmp_path: Path) -> None:
    """The loss falls by a good part, and training from a saved state equals unbroken training bit for bit, dropout
    included."""
    write_text(tmp_path / "text.txt", 60)
    task = made(tmp_path, model={"config": {**GPT2, "resid_pdrop": 0.1}})
    settings = TrainConfig.model_validate({"device": "cpu", "steps_per_round": 12, "accumulate": 2, "batch_size": 8})
    whole, first, second = (Trainer(task, task.data("train"), settings, seed=0) for _ in range(3))
    start = whole.evaluate(task.data("test"))["loss"]
    whole.train(1)
    whole.train(2)
    assert whole.evaluate(task.data("test"))["loss"] < start - 0.5
    first.train(1)
    second.load_state(first.state())
    second.train(2)
    for name, tensor in whole.weights().items():
        assert torch.equal(second.weights()[name], tensor), name


def test_a_tokenizer_of_a_folder(tmp_path: Path) -> None:
    """Blocks hold the ids of the tokenizer, and its end mark; vocabulary and end are the model's too. A folder of a
    model and its tokenizer is a pretrained one."""
    texts = write_text(tmp_path / "text.txt")
    fast = write_tokenizer(tmp_path / "tokens", texts)
    task = made(tmp_path, data={"tokenizer": "tokens", "test": "text.txt", "max_length": 16})
    stream = [i for text in texts for i in [*fast(text)["input_ids"], fast.eos_token_id]]
    assert everything(task.data("test")).flatten().tolist() == stream[: len(stream) // 16 * 16]
    model = task.build_model(torch_generator(0))
    assert model.config.vocab_size == len(fast)
    assert model.config.eos_token_id == fast.eos_token_id
    model.save_pretrained(tmp_path / "tokens")
    again = made(tmp_path, model={"name": "tokens", "config": None}, data={"tokenizer": None})
    read = again.build_model(torch_generator(9))
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in read.state_dict().items())


def test_agents_with_other_tokens_do_not_agree(tmp_path: Path) -> None:
    """Two tokenizers of as many tokens, of which two have changed places."""
    write_tokenizer(tmp_path / "one", write_text(tmp_path / "text.txt"))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    tree = json.loads((tmp_path / "two" / "tokenizer.json").read_text())
    ids = tree["model"]["vocab"]
    one, two = [token for token in ids if len(token) == 1][:2]
    ids[one], ids[two] = ids[two], ids[one]
    (tmp_path / "two" / "tokenizer.json").write_text(json.dumps(tree))
    told = [made(tmp_path, data={"tokenizer": name}).agreement["tokenizer"] for name in ("one", "one", "two", "bytes")]
    assert told[0] == told[1] != told[2]
    assert told[0].partition(",")[0] == told[2].partition(",")[0]
    assert told[3] == "bytes"


def test_tokens_that_share_an_id(tmp_path: Path) -> None:
    """A model cannot tell such tokens apart; ids beyond the number of tokens need rows."""
    write_tokenizer(tmp_path / "one", write_text(tmp_path / "text.txt"))
    file = tmp_path / "one" / "tokenizer.json"
    tree = json.loads(file.read_text())
    ids = tree["model"]["vocab"]
    one, two = [token for token in ids if len(token) == 1][:2]
    file.write_text(json.dumps({**tree, "model": {**tree["model"], "vocab": {**ids, two: ids[one]}}}))
    with pytest.raises(DataError, match=rf"tokenizer of .*one gives the id {ids[one]} to two tokens"):
        made(tmp_path, data={"tokenizer": "one"})
    file.write_text(json.dumps({**tree, "model": {**tree["model"], "vocab": {**ids, two: 500}}}))
    assert made(tmp_path, data={"tokenizer": "one"}).build_model(torch_generator(0)).config.vocab_size == 501


def test_labels_go_with_documents(tmp_path: Path) -> None:
    """JSON Lines with a column of labels: every block is of one label, and has it."""
    rows = [{"body": text, "topic": "a" if i % 3 else "b"} for i, text in enumerate(sentences(60))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"name": "rows.jsonl", "test": "rows.jsonl", "text_column": "body"}
    task = made(tmp_path, data={**data, "label_column": "topic"})
    assert task.classes == ("a", "b")
    test = task.data("test")
    for label, name in enumerate(task.classes):
        stream = [byte for row in rows if row["topic"] == name for byte in [*row["body"].encode(), 256]]
        own = everything(test)[test.labels == label].flatten().tolist()
        assert own == stream[: len(stream) // 32 * 32]
    assert made(tmp_path, data=data).data("train").labels is None
    del rows[4]["topic"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"training text of rows\.jsonl, column 'topic': row 4 has no label \(1 such"):
        made(tmp_path, data={**data, "label_column": "topic"})


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"data": {"tokenizer": None}}, ConfigError, "task.options.data.tokenizer: which one?"),
        ({"data": {"tokenizer": "./nothing"}}, DataError, "task.options.data.tokenizer: there is no file or folder"),
        (
            {"data": {"max_length": 65}},
            ConfigError,
            "task.options.data.max_length is 65; the model takes 64 tokens at most",
        ),
        (
            {"model": {"config": {**GPT2, "vocab_size": 100}}},
            ConfigError,
            "has 257 tokens, the model a vocabulary of 100",
        ),
        ({"model": {"config": {"model_type": "vit"}}}, ConfigError, "no causal language model of the type 'vit'"),
        (
            {"data": {"text_column": "body"}},
            ConfigError,
            "task.options.data.text_column: the data have no column 'body'",
        ),
        ({"data": {"train_samples": 1}}, DataError, "too few for a probe set"),
        ({"data": {"name": "empty.txt"}}, DataError, "task.options.data.name"),
        ({"data": {"name": "text.pdf"}}, ConfigError, "is none of .parquet"),
        ({"model": {"name": "no-model", "config": None}}, DataError, "cannot read"),
    ],
)
def test_bad_options_are_one_line(tmp_path: Path, options: dict[str, Any], error: type[Exception], said: str) -> None:
    """What is wrong, where, and what to do."""
    write_text(tmp_path / "text.txt", 40)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "text.pdf").write_text("")
    (tmp_path / "no-model").mkdir()
    with pytest.raises(error) as caught:
        made(tmp_path, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_probe_text_of_its_own(tmp_path: Path) -> None:
    """Probe blocks are those of the probe text, the same at agents with other training text, which is all trained on;
    a source of several splits is asked for one."""
    texts = write_text(tmp_path / "text.txt", 40)
    (tmp_path / "other.txt").write_text("\n\n".join(sentences(40, seed=1)))
    public = sentences(9, seed=2)
    (tmp_path / "public.txt").write_text("\n\n".join(public))
    one, two = (
        made(tmp_path, data={"name": f"{name}.txt", "test": "text.txt"}, probe={"name": "public.txt"})
        for name in ("text", "other")
    )
    stream = [byte for text in public for byte in [*text.encode(), 256]]
    blocks = torch.tensor(stream[: len(stream) // 32 * 32]).reshape(-1, 32).tolist()
    probe = everything(one.data("probe")).tolist()
    assert len(probe) == 4
    assert all(block in blocks for block in probe)
    assert everything(two.data("probe")).tolist() == probe
    own = [byte for text in texts for byte in [*text.encode(), 256]]
    assert everything(one.data("train")).flatten().tolist() == own[: len(own) // 32 * 32]
    every = made(tmp_path, data={"test": "text.txt"}, probe={"name": "public.txt", "count": 1000}).data("probe")
    assert sorted(everything(every).tolist()) == sorted(blocks)
    with pytest.raises(ConfigError, match=r"task.options.probe.split: public.txt has no split 'validation'"):
        made(tmp_path, probe={"name": "public.txt", "split": "validation"})
    with pytest.raises(DataError, match=r"task.options.probe.name: there is no file or folder"):
        made(tmp_path, probe={"name": "./nothing.txt"})
