"""Image classification on a user's own images: CIFAR-style Parquet files or class folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dimat.errors import ConfigError, DataError
from dimat.tasks.classification import ClassificationTask
from dimat.tasks.data import TensorData, balanced_draw
from dimat.tasks.heads import Head
from dimat.tasks.image_files import ImageSource, PixelFormat, decode_images, open_images
from dimat.tasks.models import ImageCNN, ImageViT, Shortcut, mlp, resnet20, seeded
from dimat.tasks.registry import TASKS

CROP_SHARE = 8  # of the height: 4 pixels of 32, as is usual for CIFAR
Count = Annotated[int, Field(ge=1)]


@TASKS.register("images")
def images(
    *,
    train: str,
    test: str,
    model: Literal["resnet20", "cnn", "vit", "mlp"] = "resnet20",
    width: Count | None = None,
    shortcut: Shortcut = "A",
    patch: Count = 4,
    head: Head = "linear",
    size: Annotated[int, Field(ge=8)] | None = None,
    limit: Count | None = None,
    test_limit: Count | None = None,
    augment: bool = True,
    crop: Annotated[int, Field(ge=0)] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    probe: Annotated[int, Field(ge=2)] = 100,
    seed: Annotated[int, Field(ge=0)] = 0,
    folder: Path = Path(),
) -> ClassificationTask:
    """Images from Parquet files (Hugging Face's layout, e.g. CIFAR) or from folders with one class each.

    train, test: a Parquet file, a folder of them, or a folder of class folders of PNG or JPEG files. model: "resnet20"
    (`width` multiplies its channels, default 1; `shortcut` "A" or "B"), "cnn" (four convolutions, `width` channels in
    the first, default 32), "vit" (a vision transformer: `patch` pixels square a token, 4 blocks of `width` channels,
    default 64, 4 heads) or "mlp" (two layers of `width` units, default 128). head: "linear", or "simplex", a classifier
    whose classes have fixed directions. size: resize to a square of this many pixels. limit, test_limit: use at most
    this many images, class-balanced, drawn with `seed`. augment: random shift by up to `crop` pixels (default: an
    eighth of the height, 4 of 32) and horizontal flip when training. mean, std: per channel, of pixels in [0, 1]; by
    default those of the training images. **Agents on separate machines must give the same mean and std**, or their
    networks see different inputs. probe: number of training images set aside as the probe set, drawn with `seed`.
    """
    source, test_source = open_images(folder / train), open_images(folder / test)
    classes = _common_classes(source, test_source)
    wanted = None if limit is None else limit + probe
    chosen = balanced_draw(source.labels, wanted or len(source.labels), np.random.default_rng(seed))
    if len(chosen) < probe + 2:
        raise DataError(f"{folder / train} holds {len(chosen)} images, too few for a probe set of {probe} and training")
    probes, own = chosen[:probe], chosen[probe:].sort().values
    pixels = decode_images(source, own, None, size)
    _, channels, height, wide = pixels.shape
    form = PixelFormat(channels, height, wide, size is not None)
    tested = balanced_draw(test_source.labels, test_limit or len(test_source.labels), np.random.default_rng(seed))
    tested = tested.sort().values
    shift, scale = _normalisation(pixels, mean, std)
    plain = ImageTransform(shift, scale)
    padding = height // CROP_SHARE if crop is None else crop
    count = len(classes)
    if model == "vit" and height != wide:
        raise ConfigError(f'model = "vit" is for square images, these are {wide}×{height}; set the option size')
    units = width or 128
    factories = {
        "resnet20": lambda: resnet20(width or 1, shortcut, count, channels, head),
        "cnn": lambda: ImageCNN(channels, count, width or 32, head),
        "vit": lambda: ImageViT(height, patch, channels, count, width or 64, head=head),
        "mlp": lambda: mlp((channels * height * wide, units, units, count), head),
    }
    return ClassificationTask(
        name="images",
        model=seeded(factories[model]),
        train=TensorData(pixels, source.labels[own], ImageTransform(shift, scale, padding if augment else None)),
        test=TensorData(decode_images(test_source, tested, form, None), test_source.labels[tested], plain),
        probe=TensorData(decode_images(source, probes, form, None), source.labels[probes], plain),
        classes=classes,
        agreement={"inputs": normalisation_text(shift, scale)},
    )


def normalisation_text(mean: Sequence[float], std: Sequence[float]) -> str:
    """Return the scaling of pixels as text for agents to compare; rounded, as each may have computed it."""
    return " ".join(f"{name} {', '.join(f'{v:.3f}' for v in each)}" for name, each in (("mean", mean), ("std", std)))


class ImageTransform:
    """Stored pixels (B, C, H, W) uint8 → model inputs, float32: (x / 255 − mean) / std per channel.

    With `crop` and a generator, each image is first shifted at random by up to that many pixels, with a border in the
    mean's colour, and mirrored with probability ½.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], crop: int | None = None) -> None:
        self._shift = torch.tensor(mean).mul(255.0)[:, None, None]
        self._scale = torch.tensor(std).mul(255.0).reciprocal()[:, None, None]
        self._crop = crop
        self._border = torch.tensor(mean).mul(255.0).round().clamp(0, 255).to(torch.uint8)

    def __call__(self, inputs: tuple[Tensor, ...], generator: torch.Generator | None) -> tuple[Tensor, ...]:
        (pixels,) = inputs
        if self._crop is not None and generator is not None:
            pixels = mirrored(cropped(pixels, self._crop, generator, self._border), generator)
        return (pixels.float().sub_(self._shift).mul_(self._scale),)


def cropped(pixels: Tensor, padding: int, generator: torch.Generator, border: Tensor) -> Tensor:
    """Shift each of (B, C, H, W) by its own random offset of up to `padding` pixels, filling with `border`, (C,)."""
    count, channels, height, width = pixels.shape
    down, right = torch.randint(2 * padding + 1, (2, count), generator=generator)
    wide = border.to(pixels)[:, None, None].expand(count, channels, height + 2 * padding, width + 2 * padding).clone()
    wide[:, :, padding : padding + height, padding : padding + width] = pixels
    windows = wide.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(count), :, down, right]


def mirrored(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each of (B, C, H, W) left to right with probability ½."""
    flip = torch.rand(len(pixels), generator=generator) < 0.5
    return torch.where(flip[:, None, None, None], pixels.flip(3), pixels)


def _common_classes(train: ImageSource, test: ImageSource) -> tuple[str, ...]:
    if train.classes and test.classes and train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(f"train and test have different classes, e.g. {', '.join(odd[:3]) or 'in another order'}")
    count = 1 + max(int(train.labels.max()), int(test.labels.max()))
    return train.classes or test.classes or tuple(map(str, range(count)))


def _normalisation(
    pixels: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel of pixels in [0, 1], given or computed in float64."""
    channels = pixels.shape[1]
    for name, given in (("mean", mean), ("std", std)):
        if given is not None and len(given) != channels:
            raise ConfigError(f"task.options.{name} has {len(given)} values; the images have {channels} channels")
    if std is not None and min(std) <= 0:
        raise ConfigError("task.options.std must be positive")
    means: list[float] = []
    stds: list[float] = []
    levels = torch.arange(256, dtype=torch.float64) / 255.0
    for channel in range(channels):
        share = torch.bincount(pixels[:, channel].flatten(), minlength=256).double()
        share /= share.sum()
        centre = float(share @ levels)
        means.append(centre)
        stds.append(max(float(share @ (levels - centre).square()) ** 0.5, 1 / 255))
    return list(mean) if mean is not None else means, list(std) if std is not None else stds
