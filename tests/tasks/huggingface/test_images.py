"""Image classification with transformers' models. References: the pixels that files were written from, transformers'
own models called directly, and pillow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dimat.config import TaskConfig
from dimat.errors import ConfigError, DataError
from dimat.seeds import torch_generator
from dimat.symmetry import derive_symmetry, verify_symmetry
from dimat.tasks import Task, load_task, partition
from tests.tasks.huggingface.samples import (
    CONVNEXT,
    RESNET,
    VIT,
    grouped,
    picture,
    png,
    write_class_folders,
    write_parquet,
)


def made(folder: Path, **options: Any) -> Any:
    tree = grouped({"data": {"name": "colours.parquet"}, "model": {"config": VIT}, "probe": {"count": 6}}, options)
    if tree["model"].get("config") == RESNET:  # which says nothing of the size of its images
        tree["data"]["size"] = 12
    return load_task(TaskConfig(name="hf-image-classification", options=tree), folder)


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "colours.parquet")
    return tmp_path


def test_a_task_from_parquet_is_one(colours: Path) -> None:
    """Splits are disjoint and of the sizes asked for; images come as the processor of the model has them."""
    task = made(colours, data={"test_share": 0.25})
    assert isinstance(task, Task)
    assert task.classes == ("0", "1", "2")
    train, test, probe = (task.data(split) for split in ("train", "test", "probe"))
    assert (len(train), len(test), len(probe)) == (84, 30, 6)
    assert torch.bincount(probe.labels).tolist() == [2, 2, 2]
    everything = torch.cat([data.batch(torch.arange(len(data))).inputs[0] for data in (train, test, probe)])
    pixels = write_parquet(colours / "again.parquet").transpose(0, 3, 1, 2)
    expected = (torch.from_numpy(pixels).float() / 255 - 0.5) / 0.5
    order = lambda x: sorted(x.flatten(1).double().sum(1).tolist())  # noqa: E731
    assert order(everything) == pytest.approx(order(expected), abs=1e-3)
    # a class is the channel that is brightest, whatever rows a split has
    batch = test.batch(torch.arange(len(test)))
    assert torch.equal(batch.inputs[0].mean((2, 3)).argmax(1), batch.targets)


@pytest.mark.parametrize("config", [VIT, RESNET, CONVNEXT], ids=lambda c: c["model_type"])
def test_models_are_drawn_from_the_generator_alone(colours: Path, config: dict[str, Any]) -> None:
    """Equal seeds give equal weights and others do not; the global stream is as it was; logits are the model's."""
    task = made(colours, model={"config": config})
    before = torch.random.get_rng_state()
    one, same, other = (task.build_model(torch_generator(seed, "init")) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    weights, again, others = (model.state_dict() for model in (one, same, other))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert any(not torch.equal(weights[name], others[name]) for name in weights)
    outputs = one(*task.example_inputs())
    assert outputs.logits.shape == (2, 3)
    targets = torch.tensor([0, 1])
    with torch.no_grad():
        expected = one(pixel_values=task.example_inputs()[0], labels=targets).loss
        torch.testing.assert_close(task.loss(one(*task.example_inputs()), targets), expected)


@pytest.mark.parametrize("config", [VIT, RESNET, CONVNEXT], ids=lambda c: c["model_type"])
def test_groups_are_derived_and_hold(colours: Path, config: dict[str, Any]) -> None:
    """Alignment goes by groups of the model as the task builds it; random permutations leave its outputs."""
    task = made(colours, model={"config": config})
    model = task.build_model(torch_generator(0, "init"))
    spec = derive_symmetry(model, task.example_inputs())
    assert spec.groups
    assert verify_symmetry(model, spec, task.example_inputs(), torch_generator(0, "verify")) < 1e-9


def test_a_pretrained_folder_with_its_processor(colours: Path) -> None:
    """Weights are those of the folder, the classifier of other classes is drawn, and size, crop, filter, mean and std
    are the processor's: as pillow does it."""
    source = made(colours).build_model(torch_generator(3, "init"))
    source.config.num_labels = 5
    type(source)(source.config).save_pretrained(colours / "five")
    source.save_pretrained(colours / "vit")
    held = {"do_resize": True, "size": {"shortest_edge": 16}, "do_center_crop": True, "resample": 3}
    held |= {"crop_size": {"height": 12, "width": 12}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (colours / "vit" / "preprocessor_config.json").write_text(json.dumps(held))
    task = made(colours, model={"name": "vit", "config": None})
    model = task.build_model(torch_generator(0, "init"))
    assert all(torch.equal(t, source.state_dict()[name]) for name, t in model.state_dict().items())
    generator = np.random.default_rng(0)
    written = [picture(i % 3, generator, 20) for i in range(12)]
    import pyarrow as pa
    from pyarrow import parquet

    images = [{"bytes": png(p), "path": None} for p in written]
    parquet.write_table(pa.table({"image": images, "label": [0, 1, 2] * 4}), colours / "large.parquet")
    task = made(
        colours,
        data={"name": "large.parquet", "test": "large.parquet"},
        model={"name": "vit", "config": None},
        probe={"count": 2},
    )
    found = task.data("test").batch(torch.tensor([0])).inputs[0][0]
    resized = Image.fromarray(written[0]).resize((16, 16), Image.Resampling.BICUBIC).crop((2, 2, 14, 14))
    expected = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1) / 255
    expected = (expected - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    five = made(colours, model={"name": "five", "config": None})
    one, two = (five.build_model(torch_generator(seed, "init")) for seed in (0, 0))
    assert one.classifier.weight.shape == (3, 16)
    assert torch.equal(one.classifier.weight, two.classifier.weight)


def test_class_folders_and_text_labels(tmp_path: Path) -> None:
    """Folders name the classes and the splits; text labels are sorted, or in the order that is given."""
    write_class_folders(tmp_path / "flowers")
    task = made(tmp_path, data={"name": "flowers"})
    assert task.classes == ("blue", "green", "red")
    assert (len(task.data("train")), len(task.data("test"))) == (24, 30)
    batch = task.data("test").batch(torch.arange(30))
    assert torch.equal(batch.inputs[0].mean((2, 3)).argmax(1), batch.targets)
    names = ["rot", "grün", "blau"] * 40
    write_parquet(tmp_path / "text.parquet", 120, farbe=names)
    task = made(tmp_path, data={"name": "text.parquet", "label_column": "farbe", "classes": ["rot", "grün", "blau"]})
    assert task.classes == ("rot", "grün", "blau")
    batch = task.data("train").batch(torch.arange(50))
    assert torch.equal(batch.inputs[0].mean((2, 3)).argmax(1), batch.targets)
    assert made(tmp_path, data={"name": "text.parquet", "label_column": "farbe"}).classes == ("blau", "grün", "rot")


def test_labels_can_be_partitioned(colours: Path) -> None:
    """Skewed splits among agents go by the images' classes."""
    train = made(colours).data("train")
    config = TaskConfig.model_validate({"partition": {"kind": "classes", "classes_per_agent": 1}}).partition
    parts = partition(train.labels, 3, config, np.random.default_rng(0))
    assert sorted(int(train.labels[part].unique()) for part in parts) == [0, 1, 2]


def test_decoding_when_read_gives_the_same(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images beyond the limit of memory are decoded at each access, with the same result."""
    kept = made(colours).data("train").batch(torch.tensor([5, 2]))
    monkeypatch.setattr("dimat.tasks.huggingface.pixels.IN_MEMORY_BYTES", 0)
    lazy = made(colours).data("train")
    read = lazy.batch(torch.tensor([5, 2]))
    assert torch.equal(read.inputs[0], kept.inputs[0])
    assert torch.equal(read.targets, kept.targets)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (
            {"model": {"config": {**VIT, "hiden_size": 3}}},
            ConfigError,
            "no setting 'hiden_size'; did you mean 'hidden_size'",
        ),
        ({"model": {"config": {"model_type": "vitt"}}}, ConfigError, "no model_type 'vitt'; did you mean 'vit'"),
        ({"model": {"config": {"model_type": "gpt2"}}}, ConfigError, "no image classifier of the type 'gpt2'"),
        ({"model": {"config": {**VIT, "hidden_size": "x"}}}, ConfigError, "task.options.model.config"),
        ({"model": {"config": {"hidden_size": 3}}}, ConfigError, "task.options.model.config needs model_type"),
        (
            {"model": {"config": None}},
            ConfigError,
            "give task.options.model.name (pretrained) or task.options.model.config (random weights)",
        ),
        ({"data": {"name": "nowhere.parquet"}}, DataError, "task.options.data.name: there is no file or folder"),
        ({"data": {"label_column": "lable"}}, ConfigError, "no column 'lable'; did you mean 'label'"),
        ({"data": {"train_split": "trian"}}, ConfigError, "no split 'trian'; did you mean 'train'"),
        ({"data": {"classes": ["a", "b"]}}, DataError, "label 2 is none of the 2 classes"),
        ({"probe": {"count": 119}}, DataError, "too few for a probe set of 119; set task.options.probe.count"),
        ({"data": {"mean": [0.5]}}, ConfigError, "task.options.data.mean has 1 values"),
        ({"model": {"dtype": "bf16"}}, ConfigError, "task.options.model.dtype is for the frozen base of lora"),
        ({"model": {"lora": {"rank": 4}}}, ConfigError, "option 'model.lora' has no key 'rank' (its keys: alpha"),
        ({"model": {"lora": {"targets": ["nothing"]}}}, ConfigError, "task.options.model.lora.targets"),
        ({"model": {"config": RESNET, "lora": {}}}, ConfigError, "is a BatchNorm"),
        ({"epochs": 3}, ConfigError, "has no option 'epochs'"),
    ],
)
def test_bad_options_are_one_line(colours: Path, options: dict[str, Any], error: type[Exception], said: str) -> None:
    """What is wrong, where, and what to do."""
    with pytest.raises(error) as caught:
        made(colours, **options).build_model(torch_generator(0))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    good = png(picture(0, np.random.default_rng(0)))
    rows = [{"bytes": b"no image" if i == 7 else good, "path": None} for i in range(20)]
    parquet.write_table(pa.table({"image": rows, "label": [0, 1] * 10}), tmp_path / "colours.parquet")
    with pytest.raises(DataError, match=r"column 'image', row \d+ is not a readable image"):
        made(tmp_path, probe={"count": 2})


@pytest.mark.parametrize("labels", [[0, None], [0.0, float("nan")], ["a", None]], ids=repr)
def test_a_label_that_is_missing_is_named(tmp_path: Path, labels: list[Any]) -> None:
    """File, column, row, how many, and what to do: none of them becomes a class of its own."""
    import pyarrow as pa
    from pyarrow import parquet

    picture_ = {"bytes": png(picture(0, np.random.default_rng(0))), "path": None}
    table = pa.table({"image": [picture_] * 20, "label": labels * 10})
    for name in ("colours", "held"):
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    told = (
        r"^training data of colours\.parquet, column 'label': row 1 has no label \(10 such rows\); leave these rows "
        r"out, or name another column with task\.options\.data\.label_column$"
    )
    with pytest.raises(DataError, match=told):
        made(tmp_path, data={"test": "held.parquet"}, probe={"count": 2})


def test_weights_that_are_no_safetensors_are_refused(colours: Path) -> None:
    """A pickled checkpoint is never read."""
    model = made(colours).build_model(torch_generator(0))
    (colours / "pickled").mkdir()
    model.config.save_pretrained(colours / "pickled")
    torch.save(model.state_dict(), colours / "pickled" / "pytorch_model.bin")
    with pytest.raises(DataError, match="safetensors"):
        made(colours, model={"name": "pickled", "config": None}).build_model(torch_generator(0))


def test_probe_images_of_their_own(colours: Path) -> None:
    """Probe images are those of the probe file, classes in balance and without augmentation; all training images are
    trained on."""
    write_parquet(colours / "public.parquet", 30, seed=4)
    task = made(colours, data={"augment": True}, probe={"name": "public.parquet", "count": 9})
    whole = {"name": "public.parquet", "split": "train", "count": 9}
    every = made(colours, data={"name": "public.parquet"}, probe=whole).data("probe")
    probe, plain = task.data("probe"), made(colours)
    assert len(task.data("train")) == len(plain.data("train")) + len(plain.data("probe"))
    assert probe.labels is not None
    assert probe.labels.bincount().tolist() == [3, 3, 3]
    rows = torch.arange(9)
    first = probe.batch(rows, torch_generator(0)).inputs[0]
    assert torch.equal(first, probe.batch(rows, torch_generator(1)).inputs[0])
    assert torch.equal(first, every.batch(rows).inputs[0])
    with pytest.raises(DataError, match=r"task.options.probe.name: there is no file or folder"):
        made(colours, probe={"name": "./nothing.parquet"})
