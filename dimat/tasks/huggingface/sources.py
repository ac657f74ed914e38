"""Opens a task's examples, on disk or on the hub, as data sets of the library `datasets`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from dimat.errors import ConfigError, DataError, nearest
from dimat.registry import OptionNames
from dimat.tasks.huggingface.library import library, local_path, telling
from dimat.tasks.huggingface.options import DataOptions, ProbeOptions

BUILDERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".txt": "text",
    ".arrow": "arrow",
}
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def open_splits(options: DataOptions, names: OptionNames, *, seed: int, folder: Path) -> tuple[Any, Any]:
    """Return the training and the test data as `datasets.Dataset`s.

    `options.name`, `options.test`: a Parquet, JSON Lines, CSV or text file, a folder of such files or of class folders
    of images, or a name on the hub. Without test data, a share of the training data, drawn with `seed`, is used as test
    data. Raises DataError, ConfigError or NetworkError that names the option as the user wrote it (`names`).
    """
    data, test, held_split = options.name, options.test, options.test_split
    splits = _open(data, names("data.name"), options.subset, folder)
    train = _split(splits, options.train_split, names("data.train_split"), data)
    if test is not None:
        others = _open(test, names("data.test"), options.subset, folder)
        # a file or folder of its own has its rows in one split, whatever that is called
        one = len(others) == 1
        held = next(iter(others.values())) if one else _split(others, held_split, names("data.test_split"), test)
    elif held_split in splits and held_split != options.train_split:
        held = splits[held_split]
    elif len(splits) > 1:
        held = _split(splits, held_split, names("data.test_split"), data)
    else:
        if len(train) < 2:
            option = names("data.name")
            raise DataError(
                f"task.options.{option}: {data} has {len(train)} rows, too few to set any aside for testing"
            )
        parted = train.train_test_split(test_size=options.test_share, seed=seed)
        train, held = parted["train"], parted["test"]
    return train, held


def open_probe(name: str, options: ProbeOptions, names: OptionNames, folder: Path) -> Any:
    """Return the source from which the probe set is drawn, as a `datasets.Dataset`. `name`: as in `open_splits`. Raises
    the errors of `open_splits`."""
    splits = _open(name, names("probe.name"), options.subset, folder)
    if options.split is None and len(splits) == 1:
        return next(iter(splits.values()))
    return _split(splits, options.split or "train", names("probe.split"), name)


def column_of(rows: Any, wanted: str | None, usual: tuple[str, ...], option: str) -> str:
    """Return the column that the option (its key as the user wrote it) names, or the first of the usual names.
    Raises ConfigError if there is none."""
    names: list[str] = list(rows.column_names)
    if wanted is not None:
        if wanted in names:
            return wanted
        raise ConfigError(
            f"task.options.{option}: the data have no column {wanted!r}{nearest(wanted, names)} "
            f"(columns: {', '.join(names)})"
        )
    for name in usual:
        if name in names:
            return name
    raise ConfigError(f"set task.options.{option} to one of the data's columns: {', '.join(names)}")


def check_labelled(rows: Any, column: str, data: str, option: str) -> None:
    """Raise DataError if a row has no label: none, or NaN. `data`: what is read, for the message; `option`: the key of
    the column."""
    kind = getattr(rows.features[column], "dtype", None)
    if not isinstance(kind, str) or kind.startswith(("list", "struct")):
        raise DataError(f"{data}, column {column!r}: labels are lists or tables; one class for each row is needed")
    if not any(value is None or value != value for value in rows.unique(column)):
        return
    lost = [row for row, value in enumerate(rows[column]) if value is None or value != value]
    raise DataError(
        f"{data}, column {column!r}: row {lost[0]} has no label ({len(lost)} such rows); leave these rows out, or name "
        f"another column with task.options.{option}"
    )


def first_rows(rows: Any, most: int | None, seed: int) -> Any:
    """Return at most `most` rows, drawn with `seed`, in the order of the data."""
    if most is None or most >= len(rows):
        return rows
    import numpy as np

    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:most])
    return rows.select(chosen)


def _open(name: str, option: str, subset: str | None, folder: Path) -> dict[str, Any]:
    path = local_path(name, folder, option)
    datasets = library("datasets")
    if path is None:
        with telling(option, name, local=False):
            return dict(datasets.load_dataset(name, subset))
    kind, files = _kind(path, option)
    # a text file is a sequence of documents with empty lines between them
    more: dict[str, Any] = {"sample_by": "paragraph"} if kind == "text" else {}
    with telling(option, str(path), local=True):
        return dict(datasets.load_dataset(kind, **files, **more))


def _kind(path: Path, option: str) -> tuple[str, dict[str, Any]]:
    if path.is_file():
        kind = BUILDERS.get(path.suffix.lower())
        if kind is None:
            raise ConfigError(f"task.options.{option}: {path} is none of {', '.join(BUILDERS)}, nor a folder of images")
        return kind, {"data_files": {"train": str(path)}}
    known = Counter(file.suffix.lower() for file in path.rglob("*") if file.is_file())
    found = [suffix for suffix, _ in known.most_common() if suffix in BUILDERS or suffix in IMAGES]
    if not found:
        raise DataError(f"task.options.{option}: no images and no {', '.join(BUILDERS)} files in {path}")
    return "imagefolder" if found[0] in IMAGES else BUILDERS[found[0]], {"data_dir": str(path)}


def _split(splits: dict[str, Any], name: str, option: str, data: str) -> Any:
    if name in splits:
        return splits[name]
    raise ConfigError(
        f"task.options.{option}: {data} has no split {name!r}{nearest(name, splits)} (splits: {', '.join(splits)})"
    )
