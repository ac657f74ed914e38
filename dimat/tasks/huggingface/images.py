"""Image classification with a model of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dimat.errors import ConfigError, DataError
from dimat.tasks.classification import ClassificationTask
from dimat.tasks.data import Subset, balanced_draw
from dimat.tasks.huggingface.base import MadeByMaker, ModelMaker
from dimat.tasks.huggingface.library import library
from dimat.tasks.huggingface.lora import LoraOptions
from dimat.tasks.huggingface.models import architecture, fits_kind
from dimat.tasks.huggingface.pixels import image_data, pixel_format
from dimat.tasks.huggingface.sources import column_of, first_rows, open_probe, open_splits
from dimat.tasks.image_files import IMAGE_COLUMNS, LABEL_COLUMNS
from dimat.tasks.registry import TASKS

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class HfImageClassification(MadeByMaker, ClassificationTask):
    """A `ClassificationTask` whose model returns transformers' outputs, with logits (B, classes) among them."""

    maker: ModelMaker = field(kw_only=True)

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return super().loss(outputs.logits, targets)

    def metrics(self, outputs: Any, targets: Tensor) -> Mapping[str, Tensor]:
        return super().metrics(outputs.logits, targets)


@TASKS.register("hf-image-classification")
def hf_image_classification(
    *,
    data: str,
    model: str | None = None,
    config: str | dict[str, Any] | None = None,
    test: str | None = None,
    subset: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.1,
    image_column: str | None = None,
    label_column: str | None = None,
    classes: tuple[str, ...] | None = None,
    train_samples: Count | None = None,
    test_samples: Count | None = None,
    size: Annotated[int, Field(ge=1)] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    augment: bool = False,
    probe: Annotated[int, Field(ge=2)] = 100,
    probe_data: str | None = None,
    probe_subset: str | None = None,
    probe_split: str | None = None,
    lora: LoraOptions | None = None,
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    seed: Annotated[int, Field(ge=0)] = 0,
    folder: Path = Path(),
) -> HfImageClassification:
    """Image classification with a model and data from Hugging Face's libraries (extra `hf`), or from disk.

    model: a folder of a pretrained model or its name on the hub; weights are read from safetensors only. Or config: a
    folder, a config.json or a table such as { model_type = "vit", hidden_size = 64, … }, with random weights.
    data: a Parquet file, a folder of them or of class folders of images, or a name on the hub (`subset`: its
    configuration), with the splits `train_split` and `test_split`; test: test data apart from it. Where there are
    none, `test_share` of the training data become them. image_column, label_column: the usual names by default.
    classes: names in label order, where labels are text; **agents with data of their own must give the same**.
    train_samples, test_samples: at most so many. size, mean, std: in the place of what the model's image processor
    says. augment: random crop and flip when training. probe: training images set aside as the probe set; with
    probe_data (a file, folder or name as `data` takes, with probe_subset and probe_split), images of that at most, and
    all training images are trained on. **Agents that compare networks on it must give equal images, probe and seed**.
    lora: { r, alpha, dropout, targets } freezes the model; adapters and the classifier are what agents exchange.
    dtype: of the frozen base. seed: of what is drawn from the data, and of a frozen base without pretrained weights.
    """
    train, held = open_splits(
        data,
        test,
        subset=subset,
        train_split=train_split,
        test_split=test_split,
        test_share=test_share,
        seed=seed,
        folder=folder,
    )
    image = column_of(train, image_column, IMAGE_COLUMNS, "image_column")
    label = column_of(train, label_column, LABEL_COLUMNS, "label_column")
    column_of(held, image, (), "image_column")
    column_of(held, label, (), "label_column")
    aside = probe if probe_data is None else 0
    names = _class_names(train, held, label, classes)
    train = first_rows(train, None if train_samples is None else train_samples + aside, seed)
    held = first_rows(held, test_samples, seed)
    labels, test_labels = (_labels(rows, label, names) for rows in (train, held))
    if len(labels) < aside + 2:
        raise DataError(f"{len(labels)} images of {data} to train on are too few for a probe set of {aside}; set probe")
    changes: dict[str, Any] = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }
    built = architecture("AutoModelForImageClassification", model, config, folder, changes)
    fits_kind(built)
    form = pixel_format(built, size, mean, std)
    maker = ModelMaker(built, lora, dtype, seed)
    order = balanced_draw(labels, len(labels), np.random.default_rng(seed))
    own, probes = order[aside:].sort().values, order[:aside]
    images = image_data(train, image, labels, form, augment=augment)
    public = images
    if probe_data is not None:
        rows = open_probe(probe_data, subset=probe_subset, split=probe_split, folder=folder)
        column_of(rows, image, (), "image_column")
        column_of(rows, label, (), "label_column")
        known = _labels(rows, label, names)
        if len(known) < 2:
            raise DataError(f"the probe set of {probe_data} has {len(known)} images; two are needed")
        public = image_data(rows, image, known, form, augment=False)
        probes = balanced_draw(known, min(probe, len(known)), np.random.default_rng(seed))
    return HfImageClassification(
        name="hf-image-classification",
        model=maker.build,
        train=Subset(images, own),
        test=image_data(held, image, test_labels, form, augment=False),
        probe=Subset(public, probes),
        classes=names,
        maker=maker,
    )


def _class_names(train: Any, held: Any, column: str, classes: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the names of the classes: those given, those the data name, or those that occur in them."""
    if classes is not None:
        if len(set(classes)) != len(classes) or len(classes) < 2:
            raise ConfigError("task.options.classes must be two names or more, each once")
        return classes
    feature, other = train.features[column], held.features[column]
    label_kind = library("datasets").ClassLabel
    if isinstance(feature, label_kind):
        if isinstance(other, label_kind) and list(other.names) != list(feature.names):
            odd = sorted({*other.names} ^ {*feature.names})
            raise DataError(f"train and test have different classes, e.g. {', '.join(odd[:3]) or 'in another order'}")
        return tuple(map(str, feature.names))
    values: set[Any] = {*train.unique(column), *held.unique(column)}
    if all(isinstance(value, int) for value in values):
        return tuple(map(str, range(max(int(max(values)) + 1, 2))))
    if all(isinstance(value, str) for value in values):
        return tuple(sorted(values))
    raise DataError(f"column {column!r} holds labels that are neither integers nor text")


def _labels(rows: Any, column: str, names: tuple[str, ...]) -> Tensor:
    """Return the classes of all rows, (N,) int64."""
    values: list[Any] = list(rows[column])
    feature = rows.features[column]
    if isinstance(feature, library("datasets").ClassLabel) and tuple(map(str, feature.names)) != names:
        values = [None if value is None else feature.names[value] for value in values]
    place = {name: i for i, name in enumerate(names)}
    found = [place.get(value, -1) if isinstance(value, str) else value for value in values]
    for row, value in enumerate(found):
        if not isinstance(value, int) or not 0 <= value < len(names):
            raise DataError(f"column {column!r}, row {row}: label {values[row]!r} is none of the {len(names)} classes")
    return torch.tensor(found, dtype=torch.int64)
