"""Image classification with a model of transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dimat.errors import ConfigError, DataError
from dimat.registry import OptionNames
from dimat.tasks.classification import ClassificationTask
from dimat.tasks.data import Subset, balanced_draw
from dimat.tasks.huggingface.base import MadeByMaker, ModelMaker
from dimat.tasks.huggingface.library import library
from dimat.tasks.huggingface.models import architecture, fits_kind
from dimat.tasks.huggingface.options import MODEL, NAMES, Count, DataOptions, ModelOptions, ProbeOptions, moved_keys
from dimat.tasks.huggingface.pixels import image_data, pixel_format
from dimat.tasks.huggingface.sources import check_labelled, column_of, first_rows, open_probe, open_splits
from dimat.tasks.image_files import IMAGE_COLUMNS, LABEL_COLUMNS
from dimat.tasks.registry import TASKS


class ImageData(DataOptions):
    """Labelled images: a Parquet file, a folder of them or of class folders of images, or a name on the hub.

    `image_column`, `label_column`: by default the usual names. `classes`: their names in label order, if labels are
    text; **agents with data of their own must give the same**. `size`, `mean`, `std`: instead of the settings of the
    model's image processor. `augment`: random crop and flip when training.
    """

    image_column: str | None = None
    classes: tuple[str, ...] | None = None
    size: Count | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: bool = False


class ImageProbe(ProbeOptions):
    """A probe set of images, 100 by default."""

    count: Annotated[int, Field(ge=2)] = 100


PROBE = ImageProbe()


@dataclass(frozen=True)
class HfImageClassification(MadeByMaker, ClassificationTask):
    """A `ClassificationTask` whose model returns transformers' outputs, with logits (B, classes) among them."""

    maker: ModelMaker = field(kw_only=True)


@TASKS.register("hf-image-classification", moved=moved_keys(ImageData))
def hf_image_classification(
    *,
    data: ImageData,
    model: ModelOptions = MODEL,
    probe: ImageProbe = PROBE,
    seed: Annotated[int, Field(ge=0)] = 0,
    folder: Path = Path(),
    option_names: OptionNames = NAMES,
) -> HfImageClassification:
    """Image classification with a model and data from Hugging Face's libraries (extra `hf`), or from disk.

    data: { name, … }, see `ImageData`. model: { name, … } or { config, … }, see `ModelOptions`; adapters and the
    classifier are what agents with `lora` exchange. probe: `count` training images, or images of { name, … }, in which
    case all training images are used for training. **Agents that compare networks on it must give equal images, probe
    and seed**. seed: of the draws from the data, and of a frozen base without pretrained weights.
    """
    train, held = open_splits(data, option_names, seed=seed, folder=folder)
    option = option_names("data.image_column"), option_names("data.label_column")
    image = column_of(train, data.image_column, IMAGE_COLUMNS, option[0])
    label = column_of(train, data.label_column, LABEL_COLUMNS, option[1])
    column_of(held, image, (), option[0])
    column_of(held, label, (), option[1])
    for rows, kind in ((train, "training data"), (held, "test data")):
        check_labelled(rows, label, f"{kind} of {data.name}", option[1])
    aside = probe.count if probe.name is None else 0
    classes = _class_names(train, held, label, data.classes, option_names("data.classes"))
    train = first_rows(train, None if data.train_samples is None else data.train_samples + aside, seed)
    held = first_rows(held, data.test_samples, seed)
    labels, test_labels = (_labels(rows, label, classes) for rows in (train, held))
    if len(labels) < aside + 2:
        raise DataError(
            f"{len(labels)} training images of {data.name} are too few for a probe set of {aside}; set "
            f"task.options.{option_names('probe.count')}"
        )
    changes: dict[str, Any] = {
        "num_labels": len(classes),
        "id2label": dict(enumerate(classes)),
        "label2id": {name: i for i, name in enumerate(classes)},
    }
    built = architecture("AutoModelForImageClassification", model, option_names, folder, changes)
    fits_kind(built)
    form = pixel_format(built, data.size, data.mean, data.std, option_names)
    maker = ModelMaker(built, model, option_names, seed)
    order = balanced_draw(labels, len(labels), np.random.default_rng(seed))
    own, probes = order[aside:].sort().values, order[:aside]
    images = image_data(train, image, labels, form, augment=data.augment)
    public = images
    if probe.name is not None:
        rows = open_probe(probe.name, probe, option_names, folder)
        column_of(rows, image, (), option[0])
        column_of(rows, label, (), option[1])
        check_labelled(rows, label, f"the probe set of {probe.name}", option[1])
        known = _labels(rows, label, classes)
        if len(known) < 2:
            raise DataError(f"the probe set of {probe.name} has {len(known)} images; two are needed")
        public = image_data(rows, image, known, form, augment=False)
        probes = balanced_draw(known, min(probe.count, len(known)), np.random.default_rng(seed))
    return HfImageClassification(
        name="hf-image-classification",
        model=maker.build,
        train=Subset(images, own),
        test=image_data(held, image, test_labels, form, augment=False),
        probe=Subset(public, probes),
        classes=classes,
        maker=maker,
    )


def _class_names(train: Any, held: Any, column: str, classes: tuple[str, ...] | None, option: str) -> tuple[str, ...]:
    """Return the names of the classes: those given, those in the data's metadata, or those that occur in the data."""
    if classes is not None:
        if len(set(classes)) != len(classes) or len(classes) < 2:
            raise ConfigError(f"task.options.{option} must be two names or more, each once")
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
        values = [feature.names[value] for value in values]
    place = {name: i for i, name in enumerate(names)}
    found = [place.get(value, -1) if isinstance(value, str) else value for value in values]
    for row, value in enumerate(found):
        if not isinstance(value, int) or not 0 <= value < len(names):
            raise DataError(f"column {column!r}, row {row}: label {values[row]!r} is none of the {len(names)} classes")
    return torch.tensor(found, dtype=torch.int64)
