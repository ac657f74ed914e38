"""scikit-learn's bundled handwritten digits: 1,797 grey images of 8×8, ten classes.

Offline and loaded in milliseconds: the task of the demo and of most tests.
"""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from dimat.errors import ConfigError, DataError
from dimat.tasks.classification import ClassificationTask
from dimat.tasks.data import Subset, TensorData, balanced_draw
from dimat.tasks.heads import Head
from dimat.tasks.models import DigitsCNN, ImageViT, mlp, seeded
from dimat.tasks.registry import TASKS

TEST_SAMPLES = 360
MAX_PROBE = 1000


@TASKS.register("digits")
def digits(
    *,
    model: Literal["cnn", "mlp", "vit"] = "cnn",
    width: int | None = None,
    hidden: tuple[int, ...] = (64, 64),
    head: Head = "linear",
    probe: int = 100,
) -> ClassificationTask:
    """Handwritten digits, 8×8, bundled with scikit-learn.

    model: "cnn" (three BatchNorm convolutions, `width` channels in the first, default 16), "mlp" (`hidden` units per
    layer) or "vit" (a vision transformer: patches of 2×2, 4 blocks of `width` channels, default 32, 4 heads). head:
    "linear", or "simplex", a classifier whose classes have fixed directions. probe: number of images for the probe set.
    The split is the same for every seed: 360 images to test (36 per class), and of the other 1,437 `probe` (class-
    balanced) for the probe set, the rest to train on.
    Inputs are (B, 1, 8, 8) in about [−1, 1].
    """
    if not 2 <= probe <= MAX_PROBE:
        raise ConfigError(f"task.options.probe: {probe} images; digits has 2 to {MAX_PROBE} to spare")
    images, labels = _load()
    data = TensorData(images, labels)
    order = balanced_draw(labels, len(labels), np.random.default_rng(0))
    test, probes, train = (
        order[:TEST_SAMPLES],
        order[TEST_SAMPLES : TEST_SAMPLES + probe],
        order[TEST_SAMPLES + probe :],
    )
    # Held as tensors of their own, in the order of the file, so that batches are read without indirection.
    parts = [TensorData(images[part], labels[part]) for part in (train.sort().values, test.sort().values)]
    sizes = (64, *hidden, 10)
    factories = {
        "cnn": lambda: DigitsCNN(width=width or 16, head=head),
        "mlp": lambda: mlp(sizes, head),
        "vit": lambda: ImageViT(8, 2, 1, width=width or 32, head=head),
    }
    return ClassificationTask(
        name="digits",
        model=seeded(factories[model]),
        train=parts[0],
        test=parts[1],
        probe=Subset(data, probes),
        classes=tuple("0123456789"),
    )


def _load() -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (1797, 1, 8, 8) float32 and labels (1797,) int64."""
    # Reading the file beside the package takes 20 ms; importing sklearn.datasets takes two seconds.
    package = find_spec("sklearn")
    folders = [] if package is None else package.submodule_search_locations or []
    for folder in folders:
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            with gzip.open(file, "rt", encoding="ascii") as stream:
                table = np.loadtxt(stream, delimiter=",", dtype=np.float32)
            pixels = torch.from_numpy(table[:, :-1].copy()).reshape(-1, 1, 8, 8)
            return (pixels - 8.0) / 8.0, torch.from_numpy(table[:, -1].astype(np.int64))
    raise DataError("scikit-learn's digits are not there: reinstall it (pip install --force-reinstall scikit-learn)")
