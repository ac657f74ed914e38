"""From encoded images to a model's inputs, by the settings of its image processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dimat.errors import ConfigError, DataError
from dimat.registry import OptionNames
from dimat.tasks.base import Batch, Data
from dimat.tasks.data import TensorData
from dimat.tasks.huggingface.library import library, telling
from dimat.tasks.huggingface.models import Architecture
from dimat.tasks.image_files import required
from dimat.tasks.images import ImageTransform

IN_MEMORY_BYTES = 2 << 30
"""Decoded images are kept in memory up to this size, and otherwise decoded at each access."""
BILINEAR = 2
CONVNEXT_CROPS_BELOW = 384
CROP_PADDING = 4  # pixels by which images are shifted at most in training


@dataclass(frozen=True)
class Preprocessing:
    """Images become (channels, height, width) uint8, and then (x / 255 − mean) / std per channel.

    `shortest`: the shorter edge is resized to this many pixels and the middle of (height, width) is cut out; without it
    an image is resized to (height, width). `resample`: pillow's number of the filter.
    """

    channels: int
    height: int
    width: int
    shortest: int | None
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def decode(self, data: bytes | Path, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return an encoded image as (channels, height, width); DataError with its name if it is damaged."""
        try:
            with required("PIL.Image").open(BytesIO(data) if isinstance(data, bytes) else data) as image:
                image = image.convert("L" if self.channels == 1 else "RGB")
                image = self._fitted(image)
                pixels = np.asarray(image, dtype=np.uint8)
        except Exception as error:  # decoders raise whatever the damage leads to
            raise DataError(f"{name} is not a readable image ({type(error).__name__}: {error})") from error
        return pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)

    def _fitted(self, image: Any) -> Any:
        if self.shortest is None:
            return image.resize((self.width, self.height), self.resample)
        scale = self.shortest / min(image.size)
        image = image.resize([max(self.shortest, round(side * scale)) for side in image.size], self.resample)
        left, top = (image.size[0] - self.width) // 2, (image.size[1] - self.height) // 2
        return image.crop((left, top, left + self.width, top + self.height))


def pixel_format(
    built: Architecture,
    size: int | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    names: OptionNames,
) -> Preprocessing:
    """Return the format that a pretrained model's image processor asks for; `size`, `mean` and `std`, if given,
    override it. Without a processor: the configuration's image size, and mean and std of 0.5. Raises ConfigError that
    names the option as the user wrote it (`names`)."""
    held = _processor(built)
    channels = int(getattr(built.config, "num_channels", 3))
    if channels not in (1, 3):
        raise ConfigError(f"the model takes images of {channels} channels; this task reads 1 (grey) or 3 (RGB)")
    sizes = _sizes(built, held, size)
    if sizes is None:
        raise ConfigError(f"set task.options.{names('data.size')}: the model does not state the size of its images")
    height, width, shortest = sizes
    plain = not held.get("do_normalize", True)
    means = mean or tuple(held.get("image_mean") or (0.5,) * channels if not plain else (0.0,) * channels)
    stds = std or tuple(held.get("image_std") or (0.5,) * channels if not plain else (1.0,) * channels)
    for name, values in (("mean", means), ("std", stds)):
        if len(values) != channels:
            option = names(f"data.{name}")
            raise ConfigError(f"task.options.{option} has {len(values)} values; the model takes {channels} channels")
    if min(stds) <= 0:
        raise ConfigError(f"task.options.{names('data.std')} must be positive")
    return Preprocessing(channels, height, width, shortest, int(held.get("resample", BILINEAR)), means, stds)


def image_data(rows: Any, column: str, labels: Tensor, form: Preprocessing, *, augment: bool) -> Data:
    """Return rows of encoded images as examples; `augment`: cropped and mirrored at random when training."""
    encoded = rows.cast_column(column, library("datasets").Image(decode=False))
    transform = ImageTransform(form.mean, form.std, CROP_PADDING if augment else None)
    lazy = LazyImages(encoded, column, labels, form, transform)
    if len(labels) * form.channels * form.height * form.width > IN_MEMORY_BYTES:
        return lazy
    return TensorData(lazy.pixels(torch.arange(len(labels))), labels, transform)


class LazyImages:
    """Images that are decoded at each access."""

    def __init__(self, rows: Any, column: str, labels: Tensor, form: Preprocessing, transform: ImageTransform) -> None:
        self._rows = rows
        self._column = column
        self._labels = labels
        self._form = form
        self._transform = transform

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> Tensor:
        return self._labels

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        return Batch(self._transform((self.pixels(indices),), generator), self._labels[indices])

    def pixels(self, indices: Tensor) -> Tensor:
        """Return the images at `indices` as (B, channels, height, width) uint8."""
        form = self._form
        found = np.empty((len(indices), form.channels, form.height, form.width), dtype=np.uint8)
        for i, index in enumerate(indices.tolist()):
            name = f"column {self._column!r}, row {index}"
            found[i] = form.decode(_encoded(self._rows[index][self._column], name), name)
        return torch.from_numpy(found)


def _encoded(value: Any, name: str) -> bytes | Path:
    held = value if isinstance(value, Mapping) else {}
    if held.get("bytes"):
        return held["bytes"]
    if held.get("path"):
        return Path(held["path"])
    raise DataError(f"{name} holds no image")


def _processor(built: Architecture) -> dict[str, Any]:
    if built.weights is None or (built.local and not (Path(built.weights) / "preprocessor_config.json").is_file()):
        return {}
    library("transformers")
    from importlib import import_module

    mixin = import_module("transformers.image_processing_base").ImageProcessingMixin
    with telling(built.option, built.weights, built.local):
        return dict(mixin.get_image_processor_dict(built.weights, local_files_only=built.local)[0])


def _sizes(built: Architecture, held: Mapping[str, Any], size: int | None) -> tuple[int, int, int | None] | None:
    """Return height, width and the length to which the shorter edge is resized (None if both edges are); None if the
    processor does not state them."""
    if size is not None:
        return size, size, None
    told = held.get("size")
    if isinstance(told, int):
        told = {"height": told, "width": told}
    crop = held.get("crop_size") if held.get("do_center_crop") else None
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    if isinstance(told, Mapping) and "height" in told:
        return int(told["height"]), int(told["width"]), None
    if isinstance(told, Mapping) and "shortest_edge" in told:
        edge = int(told["shortest_edge"])
        if crop is not None:
            return int(crop["height"]), int(crop["width"]), edge
        share = held.get("crop_pct")  # ConvNext: cut out of a larger image, but for large ones
        if share and edge < CONVNEXT_CROPS_BELOW:
            return edge, edge, int(edge / share)
        return edge, edge, edge if not share else None
    known = getattr(built.config, "image_size", None)
    if isinstance(known, int):
        return known, known, None
    if isinstance(known, list | tuple) and len(known) == 2:
        return int(known[0]), int(known[1]), None
    return None
