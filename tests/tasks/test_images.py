"""Images from files. References: the arrays that the files were written from."""

from __future__ import annotations

import json
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dimat.config import TaskConfig
from dimat.errors import ConfigError, DataError
from dimat.tasks import load_task
from dimat.tasks.images import ImageTransform, cropped, mirrored

image_module = pytest.importorskip("PIL.Image")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ["cat", "dog", "emu"]


def pixels(samples: int, size: int = 12, channels: int = 3) -> np.ndarray:
    shape = (samples, size, size, channels) if channels == 3 else (samples, size, size)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    stream = BytesIO()
    image_module.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def write_parquet(
    file: Path, arrays: Any, labels: Any, image: str = "img", label: str = "label", names: bool = True
) -> None:
    table = pa.table({image: [{"bytes": png(a), "path": None} for a in arrays], label: labels})
    if names:
        features = {"info": {"features": {label: {"names": NAMES, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, file, row_group_size=7)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "train.parquet", pixels(30), [i % 3 for i in range(30)])
    write_parquet(tmp_path / "test.parquet", pixels(9), [i % 3 for i in range(9)])
    return tmp_path


def load(folder: Path, **options: Any) -> Any:
    base = {"train": "train.parquet", "test": "test.parquet", "model": "cnn", "probe": 6}
    return load_task(TaskConfig(name="images", options={**base, **options}), folder)


def raw(data: Any) -> torch.Tensor:
    return data.inputs[0].permute(0, 2, 3, 1)


def test_parquet_gives_back_the_pixels(folder: Path) -> None:
    task = load(folder)
    written = torch.from_numpy(pixels(30))
    train, probe = task.data("train"), task.data("probe")
    assert (len(train), len(probe), len(task.data("test"))) == (24, 6, 9)
    assert torch.equal(raw(task.data("test")), torch.from_numpy(pixels(9)))
    assert task.data("test").labels.tolist() == [i % 3 for i in range(9)]
    assert torch.bincount(probe.labels).tolist() == [2, 2, 2]
    # Train and probe together are all that was written, each with its label.
    rows = {tuple(row.flatten().tolist()): i % 3 for i, row in enumerate(written)}
    for data in (train, probe):
        for row, label in zip(raw(data), data.labels, strict=True):
            assert rows.pop(tuple(row.flatten().tolist())) == label
    assert rows == {}
    assert task.classes == tuple(NAMES)
    assert task.build_model(torch.Generator())(*task.example_inputs()).shape == (2, 3)


def test_normalisation_of_the_data_or_given(folder: Path) -> None:
    task = load(folder)
    train = task.data("train")
    (inputs,) = train.batch(torch.arange(len(train))).inputs
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    given = load(folder, mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25]).data("train")
    expected = (given.inputs[0].float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(given.batch(torch.arange(len(given))).inputs[0], expected)
    with pytest.raises(ConfigError, match="mean has 1 values; the images have 3 channels"):
        load(folder, mean=[0.5])


def test_augmentation_is_fresh_seeded_and_for_training_only(folder: Path) -> None:
    task = load(folder)
    train, indices = task.data("train"), torch.arange(20)
    generator = torch.Generator().manual_seed(0)
    first, second = (train.batch(indices, generator).inputs[0] for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, train.batch(indices, torch.Generator().manual_seed(0)).inputs[0])
    assert torch.equal(train.batch(indices).inputs[0], train.batch(indices).inputs[0])
    plain = load(folder, augment=False).data("train")
    assert torch.equal(plain.batch(indices, generator).inputs[0], train.batch(indices).inputs[0])
    probe = task.data("probe")
    assert torch.equal(probe.batch(torch.arange(6), generator).inputs[0], probe.batch(torch.arange(6)).inputs[0])


def test_crops_and_mirrors_are_those_of_a_loop() -> None:
    """Reference: pad and slice image by image with the same draws."""
    images = torch.from_numpy(pixels(16)).permute(0, 3, 1, 2)
    ours = cropped(images, 4, torch.Generator().manual_seed(3), torch.tensor([7, 8, 9]))
    down, right = torch.randint(9, (2, 16), generator=torch.Generator().manual_seed(3))
    padded = torch.stack([torch.nn.functional.pad(images[:, c], (4, 4, 4, 4), value=7 + c) for c in range(3)], 1)
    for i in range(16):
        assert torch.equal(ours[i], padded[i, :, down[i] : down[i] + 12, right[i] : right[i] + 12])
    flipped = mirrored(images, torch.Generator().manual_seed(3))
    kinds = [(torch.equal(a, b), torch.equal(a, b.flip(2))) for a, b in zip(flipped, images, strict=True)]
    assert all(same != turned for same, turned in kinds)
    assert 0 < sum(same for same, _ in kinds) < 16


def test_transform_of_grey_images_keeps_their_channel() -> None:
    transform = ImageTransform([0.0], [1.0])
    assert transform((torch.full((2, 1, 4, 4), 255, dtype=torch.uint8),), None)[0].eq(1).all()


def test_limit_is_class_balanced_and_seeded(folder: Path) -> None:
    one, same, other = (load(folder, limit=9, test_limit=3, seed=seed).data("train") for seed in (0, 0, 1))
    assert torch.bincount(one.labels).tolist() == [3, 3, 3]
    assert torch.equal(one.inputs[0], same.inputs[0])
    assert not torch.equal(one.inputs[0], other.inputs[0])
    assert len(load(folder, test_limit=3).data("test")) == 3


def test_several_parquet_files_with_other_columns(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for part in range(2):
            labels = [i % 3 for i in range(12)]
            write_parquet(tmp_path / split / f"{part}.parquet", pixels(12), labels, "image", "fine_label", names=False)
    task = load(tmp_path, train="train", test="test")
    assert len(task.data("test")) == 24
    assert task.classes == ("0", "1", "2")


def write_folders(folder: Path, sizes: tuple[int, ...] = (12,), channels: int = 3) -> None:
    for split in ("train", "test"):
        for label, name in enumerate(NAMES):
            (folder / split / name).mkdir(parents=True)
            for i in range(6):
                size = sizes[i % len(sizes)]
                array = np.full((size, size, 3)[: 3 if channels == 3 else 2], 10 * label + i, dtype=np.uint8)
                suffix = "jpg" if i == 5 else "png"
                image_module.fromarray(array).save(folder / split / name / f"{i}.{suffix}")


def test_class_folders(tmp_path: Path) -> None:
    write_folders(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    task = load(tmp_path, train="train", test="test")
    test = task.data("test")
    assert task.classes == tuple(NAMES)
    assert test.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert raw(test)[:, 0, 0, 0].tolist() == [10 * label + i for label in range(3) for i in range(6)]
    assert len(task.data("train")) == 12


def test_grey_images_of_several_sizes_are_resized_when_asked(tmp_path: Path) -> None:
    write_folders(tmp_path, sizes=(12, 16), channels=1)
    with pytest.raises(DataError, match=r"1\.png is 16×16 pixels .* 12×12; set the option size"):
        load(tmp_path, train="train", test="test", probe=2)
    task = load(tmp_path, train="train", test="test", size=8, model="resnet20")
    assert task.example_inputs()[0].shape == (2, 1, 8, 8)
    assert task.build_model(torch.Generator())(*task.example_inputs()).shape == (2, 3)


def test_wrong_columns(folder: Path) -> None:
    write_parquet(folder / "odd.parquet", pixels(3), [0, 1, 2], image="picture")
    with pytest.raises(DataError, match=r"odd\.parquet has no image column \(img or image\); .* picture, label"):
        load(folder, train="odd.parquet")
    write_parquet(folder / "odd.parquet", pixels(3), [0, 1, 2], label="klass")
    with pytest.raises(DataError, match=r"odd\.parquet has no label column"):
        load(folder, train="odd.parquet")
    write_parquet(folder / "odd.parquet", pixels(3), ["a", "b", "c"], names=False)
    with pytest.raises(DataError, match=r"odd\.parquet, column 'label': expected class numbers"):
        load(folder, train="odd.parquet")
    pq.write_table(pa.table({"img": [b""] * 4, "label": [0, 1, None, None]}), folder / "odd.parquet")
    with pytest.raises(
        DataError, match=r"odd\.parquet, column 'label': row 2 has no label \(2 such rows\); leave these"
    ):
        load(folder, train="odd.parquet")
    pq.write_table(pa.table({"img": ["path/only.png"], "label": [0]}), folder / "odd.parquet")
    with pytest.raises(DataError, match=r"odd\.parquet, column 'img', row 0: expected"):
        load(folder, test="odd.parquet")


def test_damaged_files(folder: Path) -> None:
    whole = (folder / "train.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.parquet is not a readable Parquet file"):
        load(folder, train="cut.parquet")
    with pytest.raises(DataError, match=r"no images at .*nowhere: there is no such file"):
        load(folder, train="nowhere")
    broken = [{"bytes": png(pixels(1)[0])[:200], "path": None}]
    pq.write_table(pa.table({"img": broken, "label": [0]}), folder / "broken.parquet")
    with pytest.raises(DataError, match=r"broken\.parquet, column 'img', row 0 is not a readable image"):
        load(folder, test="broken.parquet")
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="holds neither Parquet files nor class folders"):
        load(folder, train="empty")
    with pytest.raises(DataError, match="holds 30 images, too few for a probe set of 29"):
        load(folder, probe=29)


def test_without_pyarrow_the_error_says_how_to_install_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r'needs pyarrow: pip install "dimat\[images\]"'):
        load(folder)
