"""Options of the Hugging Face tasks in groups, and the flat keys of older files. Reference: the same task, written in
groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dimat.config import TaskConfig, load_experiment
from dimat.errors import ConfigError, DataError
from dimat.registry import OptionNames, regroup
from dimat.seeds import torch_generator
from dimat.tasks import load_task
from dimat.tasks.huggingface.images import ImageData
from dimat.tasks.huggingface.options import moved_keys
from dimat.tasks.huggingface.text import TextData
from tests.tasks.huggingface.samples import GPT2, VIT, write_parquet, write_text

GPT2_TOML = "{ " + ", ".join(f'{k} = "{v}"' if isinstance(v, str) else f"{k} = {v}" for k, v in GPT2.items()) + " }"


def load(folder: Path, name: str, options: dict[str, Any]) -> Any:
    return load_task(TaskConfig(name=name, options=options), folder)


def assert_same(one: Any, other: Any) -> None:
    """Equal data in all splits, equal classes, equal models, equal bases."""
    assert one.classes == other.classes
    assert one.base_hash == other.base_hash
    for split in ("train", "test", "probe"):
        mine, theirs = one.data(split), other.data(split)
        assert len(mine) == len(theirs)
        rows = torch.arange(len(mine))
        assert torch.equal(mine.batch(rows).inputs[0], theirs.batch(rows).inputs[0])
    mine, theirs = (task.build_model(torch_generator(0, "init")).state_dict() for task in (one, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_every_flat_text_option_of_older_files(tmp_path: Path) -> None:
    """All 20 options that hf-causal-lm had: none is lost, and the task is the one that the groups give."""
    write_parquet(tmp_path / "unused.parquet")
    texts = write_text(tmp_path / "text.txt", 60)
    (tmp_path / "public.txt").write_text("\n\n".join(texts[:20]))
    (tmp_path / "test.txt").write_text("\n\n".join(texts[20:40]))
    flat = {
        "data": "text.txt",
        "config": GPT2,
        "tokenizer": "bytes",
        "test": "test.txt",
        "train_split": "train",
        "test_split": "test",
        "test_share": 0.2,
        "text_column": "text",
        "max_length": 32,
        "train_samples": 40,
        "test_samples": 15,
        "probe": 5,
        "probe_data": "public.txt",
        "probe_split": "train",
        "lora": {"r": 2},
        "dtype": "bf16",
        "seed": 3,
    }
    groups = {
        "data": {
            "name": "text.txt",
            "tokenizer": "bytes",
            "test": "test.txt",
            "text_column": "text",
            "max_length": 32,
            "train_samples": 40,
            "test_samples": 15,
            "test_share": 0.2,
        },
        "model": {"config": GPT2, "lora": {"r": 2}, "dtype": "bf16"},
        "probe": {"name": "public.txt", "count": 5, "split": "train"},
        "seed": 3,
    }
    assert_same(load(tmp_path, "hf-causal-lm", flat), load(tmp_path, "hf-causal-lm", groups))
    assert set(moved_keys(TextData)) | {"seed"} == {*flat, "model", "subset", "label_column", "probe_subset"}


def test_every_flat_image_option_of_older_files(tmp_path: Path) -> None:
    """All 23 options that hf-image-classification had, likewise."""
    write_parquet(tmp_path / "colours.parquet")
    write_parquet(tmp_path / "public.parquet", 30, seed=4)
    flat = {
        "data": "colours.parquet",
        "config": VIT,
        "test_share": 0.25,
        "image_column": "image",
        "label_column": "label",
        "classes": ["r", "g", "b"],
        "train_samples": 60,
        "test_samples": 12,
        "size": 12,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.2],
        "augment": True,
        "probe": 6,
        "probe_data": "public.parquet",
        "seed": 1,
    }
    data = {key: value for key, value in flat.items() if key not in {"data", "config", "probe", "probe_data", "seed"}}
    groups = {
        "data": {"name": "colours.parquet", **data},
        "model": {"config": VIT},
        "probe": {"name": "public.parquet", "count": 6},
        "seed": 1,
    }
    name = "hf-image-classification"
    assert_same(load(tmp_path, name, flat), load(tmp_path, name, groups))
    others = {"model", "test", "subset", "train_split", "test_split", "probe_subset", "probe_split", "lora", "dtype"}
    assert set(moved_keys(ImageData)) | {"seed"} == {*flat, *others}


def test_a_name_alone_takes_more_keys(tmp_path: Path) -> None:
    """`--set` and files add to a group that was given by its name alone."""
    write_text(tmp_path / "text.txt", 40)
    file = tmp_path / "e.toml"
    file.write_text(f'[task]\nname = "hf-causal-lm"\n[task.options]\ndata = "text.txt"\nconfig = {GPT2_TOML}\n')
    sets = ("task.options.data.tokenizer=bytes", "task.options.data.max_length=32", "task.options.probe.count=4")
    task = load_task(load_experiment(file, sets, env={}).task, tmp_path)
    assert task.example_inputs()[0].shape == (2, 32)
    assert len(task.data("probe")) == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": {"name": "a", "test": "b"}, "test": "c"}, "the options 'test' and 'data.test' are the same"),
        ({"probe": {"name": "a"}, "probe_data": "b"}, "'probe_data' and 'probe.name' are the same"),
        ({"model": {"config": {}}, "config": {}}, "give only 'model.config'"),
    ],
)
def test_an_option_in_both_ways_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    """The error names both keys."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "hf-causal-lm", {"data": "text.txt", **options})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"max_length": 257}, ConfigError, "task.options.max_length is 257"),
        ({"max_length": 1}, ConfigError, "option 'max_length': Input should be greater than or equal to 2 (got 1)"),
        ({"data": {"max_length": 1, "name": "text.txt"}}, ConfigError, "option 'data.max_length': Input should be"),
        ({"data": {"max_length": 32}}, ConfigError, "option 'data.name': Field required"),
        (
            {"data": {"name": "text.txt", "max_lenght": 32}},
            ConfigError,
            "option 'data' has no key 'max_lenght'; did you",
        ),
        ({"data": "nothing.txt"}, DataError, "task.options.data: there is no file or folder"),
        ({"data": {"name": "nothing.txt"}}, DataError, "task.options.data.name: there is no file or folder"),
        ({"probe_data": "nothing.txt"}, DataError, "task.options.probe_data: there is no file or folder"),
        ({"probe": 1000}, DataError, "or task.options.probe"),
        ({"probe": {"count": 1000}}, DataError, "or task.options.probe.count"),
        ({"text_column": "body"}, ConfigError, "task.options.text_column: the data have no column"),
        ({"lora": {"targets": ["nothing"]}}, ConfigError, "task.options.lora.targets"),
        ({"lora": {"rank": 2}}, ConfigError, "option 'lora' has no key 'rank'"),
        ({"dtype": "bf16"}, ConfigError, "task.options.dtype is for the frozen base"),
        ({"config": {"model_type": "gpt3"}}, ConfigError, "task.options.config: transformers has no model_type"),
        (
            {"probe": {"many": 3}},
            ConfigError,
            "option 'probe' has no key 'many' (its keys: count, name, split, subset)",
        ),
    ],
)
def test_errors_name_the_key_that_was_written(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    """The flat key where the file has it flat, the key in the group where it has groups."""
    write_text(tmp_path / "text.txt", 90)
    whole = {"data": "text.txt", "config": {**GPT2, "n_positions": 256}, "tokenizer": "bytes", **options}
    with pytest.raises(error) as caught:
        load(tmp_path, "hf-causal-lm", whole).build_model(torch_generator(0))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_regrouping() -> None:
    """Flat keys go into their groups, and the names lead back; tables and other options stay as they are."""
    moved = {"data": "data.name", "test": "data.test", "lora": "model.lora"}
    options, names = regroup({"data": "x", "test": "y", "lora": {"r": 1}, "seed": 2}, moved, "a task")
    assert options == {"data": {"name": "x", "test": "y"}, "model": {"lora": {"r": 1}}, "seed": 2}
    written = [names(key) for key in ("data.name", "data.test", "data.test_split", "model.lora.r", "seed")]
    assert written == ["data", "test", "data.test_split", "lora.r", "seed"]
    grouped = {"data": {"name": "x"}, "seed": 2}
    assert regroup(grouped, moved, "a task") == (grouped, OptionNames())
