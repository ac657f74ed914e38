"""Reads labelled images from Parquet files (Hugging Face's layout) or class folders.

A source is opened first, which reads labels and class names; pixels are decoded for chosen examples only.
Needs pillow, and pyarrow for Parquet (extra `images`); both are imported when needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dimat.errors import ConfigError, DataError

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")
SUFFIXES = {".png", ".jpg", ".jpeg"}
ROWS = 1024  # read at a time


class ImageSource(Protocol):
    """Labelled encoded images."""

    labels: Tensor
    """(N,) int64."""
    classes: tuple[str, ...]
    """Names in label order; empty if the source has none."""

    def encoded(self, chosen: NDArray[np.bool_]) -> Iterator[tuple[bytes | Path, str]]:
        """Yield each chosen image in order (encoded, or its file), and its name for error messages."""
        ...


def open_images(path: Path) -> ImageSource:
    """Open a Parquet file, a folder of Parquet files, or a folder of class folders of PNG or JPEG files.

    Raises DataError naming file and column if it cannot be read, ConfigError if a package is missing.
    """
    if path.is_file():
        return _ParquetImages([path])
    if not path.is_dir():
        raise DataError(f"no images at {path}: there is no such file or folder")
    files = sorted(path.glob("*.parquet"))
    return _ParquetImages(files) if files else _FolderImages(path)


@dataclass(frozen=True)
class PixelFormat:
    """Shape of decoded images: `channels` 1 or 3, `height` and `width` in pixels; `resize`: images of other sizes are
    resized."""

    channels: int
    height: int
    width: int
    resize: bool


def decode_images(source: ImageSource, indices: Tensor, form: PixelFormat | None, size: int | None) -> Tensor:
    """Return the images at `indices` ((N,) int64, any order) as (N, channels, height, width) uint8.

    Without a format, that of the first image is used, resized to `size` × `size` if that is given. Raises DataError
    naming an image that is damaged or, without resizing, of another shape.
    """
    image_module = required("PIL.Image")
    chosen = np.zeros(len(source.labels), dtype=np.bool_)
    chosen[indices.numpy()] = True
    place = np.empty(len(source.labels), dtype=np.int64)  # row of each chosen example in the result
    place[indices.numpy()] = np.arange(len(indices))
    pixels: NDArray[np.uint8] | None = None
    for row, (data, name) in zip(np.flatnonzero(chosen), source.encoded(chosen), strict=True):
        try:
            with image_module.open(data if isinstance(data, Path) else BytesIO(data)) as image:
                form = form or _format_of(image, size)
                image = image.convert("L" if form.channels == 1 else "RGB")
                if form.resize:
                    image = image.resize((form.width, form.height), image_module.Resampling.BILINEAR)
                decoded = np.asarray(image)
        except Exception as error:  # decoders raise whatever the damage leads to
            raise DataError(f"{name} is not a readable image ({type(error).__name__}: {error})") from error
        if decoded.shape[:2] != (form.height, form.width):
            raise DataError(
                f"{name} is {decoded.shape[1]}×{decoded.shape[0]} pixels and the first image {form.width}×"
                f"{form.height}; set the option size to resize them all"
            )
        if pixels is None:
            pixels = np.empty((len(indices), form.channels, form.height, form.width), dtype=np.uint8)
        pixels[place[row]] = decoded[None] if form.channels == 1 else decoded.transpose(2, 0, 1)
    if pixels is None:
        raise DataError("no images were chosen")
    return torch.from_numpy(pixels)


def required(module: str) -> Any:
    """Import a module of the extra `images`, or raise ConfigError with the command that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = {"PIL": "pillow"}.get(module.partition(".")[0], module.partition(".")[0])
        raise ConfigError(f'the task "images" needs {package}: pip install "dimat[images]"') from error


def _format_of(image: Any, size: int | None) -> PixelFormat:
    channels = 1 if image.mode in ("1", "L", "I", "I;16", "F") else 3
    width, height = image.size if size is None else (size, size)
    return PixelFormat(channels, height, width, size is not None)


class _ParquetImages:
    """Rows of Parquet files: an image column of {bytes, path} and an integer label column."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        labels: list[NDArray[np.int64]] = []
        self.classes: tuple[str, ...] = ()
        self._images: list[str] = []
        for file in files:
            opened = _open_parquet(file)
            schema = opened.schema_arrow
            self._images.append(_column(file, schema.names, IMAGE_COLUMNS, "image"))
            column = _column(file, schema.names, LABEL_COLUMNS, "label")
            labels.append(_read_labels(file, opened, column))
            self.classes = self.classes or _class_names(schema.metadata, column)
        self._rows = [len(part) for part in labels]
        self.labels = torch.from_numpy(np.concatenate(labels))
        if self.classes and len(self.labels) and int(self.labels.max()) >= len(self.classes):
            raise DataError(f"{files[0]}: label {int(self.labels.max())}, but {len(self.classes)} class names")

    def encoded(self, chosen: NDArray[np.bool_]) -> Iterator[tuple[bytes | Path, str]]:
        first = 0
        for file, column, rows in zip(self._files, self._images, self._rows, strict=True):
            own = chosen[first : first + rows]
            first += rows
            start = 0
            for batch in _batches(file, column):
                part = own[start : start + len(batch)]
                for offset in np.flatnonzero(part):
                    name = f"{file}, column {column!r}, row {start + int(offset)}"
                    yield _image_bytes(batch[int(offset)].as_py(), name), name
                start += len(batch)


def _open_parquet(file: Path) -> Any:
    parquet = required("pyarrow.parquet")
    try:
        return parquet.ParquetFile(file)
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise DataError(f"{file} is not a readable Parquet file: {_first_line(error)}") from error


def _column(file: Path, names: list[str], wanted: tuple[str, ...], what: str) -> str:
    for name in wanted:
        if name in names:
            return name
    raise DataError(f"{file} has no {what} column ({' or '.join(wanted)}); its columns are {', '.join(names)}")


def _read_labels(file: Path, opened: Any, column: str) -> NDArray[np.int64]:
    try:
        values = opened.read(columns=[column]).column(0)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}, column {column!r} cannot be read: {_first_line(error)}") from error
    array = cast("NDArray[Any]", values.to_numpy())
    if values.null_count:
        first = values.is_null().index(True).as_py()
        raise DataError(
            f"{file}, column {column!r}: row {first} has no label ({values.null_count} such rows); leave these rows out"
        )
    if array.dtype.kind not in "iu" or (len(array) and array.min() < 0):
        raise DataError(f"{file}, column {column!r}: expected class numbers from 0 without gaps, got {values.type}")
    return array.astype(np.int64)


def _batches(file: Path, column: str) -> Iterator[Any]:
    opened = _open_parquet(file)
    try:
        for batch in opened.iter_batches(batch_size=ROWS, columns=[column]):
            yield batch.column(0)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}, column {column!r} cannot be read: {_first_line(error)}") from error


def _image_bytes(value: Any, name: str) -> bytes:
    encoded: Any = cast("dict[str, Any]", value).get("bytes") if isinstance(value, dict) else value
    if not isinstance(encoded, bytes):
        raise DataError(f"{name}: expected {{bytes, path}} with the encoded image in bytes")
    return encoded


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...]:
    """Return the class names that the datasets library wrote into the schema, if it did."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[column]["names"])
    except (KeyError, TypeError, ValueError):
        return ()  # names are a comfort; files by other writers have none


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _FolderImages:
    """`<class>/<image>.png|jpg` under one folder; classes in alphabetical order."""

    def __init__(self, folder: Path) -> None:
        self.classes = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
        self._files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            found = sorted(file for file in (folder / name).iterdir() if file.suffix.lower() in SUFFIXES)
            if not found:
                raise DataError(f"{folder / name} holds no PNG or JPEG files")
            self._files += found
            labels += [label] * len(found)
        if not labels:
            raise DataError(f"{folder} holds neither Parquet files nor class folders of PNG or JPEG files")
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def encoded(self, chosen: NDArray[np.bool_]) -> Iterator[tuple[bytes | Path, str]]:
        for row in np.flatnonzero(chosen):
            yield self._files[row], str(self._files[row])
