"""Finds a model's files: a file, shards, a folder, a Hugging Face cache; other formats."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from dimat.errors import DataError
from dimat.merge_files.files import ADAPTER, ADAPTER_CONFIG, CONFIG, DIFFUSERS, INDEX, WEIGHTS, ModelFiles
from dimat.reading import read_table, read_text
from dimat.weights.header import read_header

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}

PIPELINE = "model_index.json"
"""What diffusers writes beside the folders of a pipeline's parts."""

SHARD = re.compile(r".*-\d{5}-of-(\d{5})\.safetensors")
"""Names of shards, with their total number."""

OTHERS = {
    ".gguf": "GGUF files, llama.cpp's format: take the model that they were made from, as safetensors",
    ".h5": "HDF5 files, as Keras writes them: convert them to safetensors first",
    ".msgpack": "msgpack files, as Flax writes them: convert them to safetensors first",
    ".onnx": "ONNX files: take the model that they were made from, as safetensors",
}
"""Suffixes of weights in other formats → the format, and what to do."""


def open_model(path: Path) -> ModelFiles:
    """Open a model; DataError if the path is not a model. The root of a Hugging Face cache is its snapshot."""
    if path.is_dir():
        return _open_folder(_snapshot(path))
    if not path.exists():
        raise DataError(f"no model {path}: give a safetensors file or a folder (models are not downloaded)")
    if path.suffix in PICKLES:
        raise DataError(f"{path} is a pickle, which can run code: convert it to safetensors first")
    if path.name.endswith(".index.json"):
        return ModelFiles(path, path.parent, _read_index(path))
    if path.name == ADAPTER and (path.parent / ADAPTER_CONFIG).exists():
        return _open_folder(path.parent)  # factors mean nothing without their scale, which stands beside them
    return _single(path, path, None)


def _snapshot(folder: Path) -> Path:
    """Return the snapshot that a Hugging Face cache names as main's, or its only one; other folders unchanged."""
    kept = folder if folder.name == "snapshots" else folder / "snapshots"
    if not kept.is_dir() or (folder / CONFIG).exists():
        models = sorted(entry.name for entry in folder.glob("models--*") if (entry / "snapshots").is_dir())
        if models:
            raise DataError(f"{folder} is a Hugging Face cache of {len(models):,} models: name one, e.g. {models[0]}")
        return folder
    found = sorted(entry for entry in kept.iterdir() if entry.is_dir())
    reference = kept.parent / "refs" / "main"
    if reference.is_file():
        main = kept / read_text(reference).strip()
        if main in found:
            return main
    if len(found) != 1:
        raise DataError(f"{folder} is a Hugging Face cache with {len(found)} snapshots and no main: name one of them")
    return found[0]


def _open_folder(folder: Path) -> ModelFiles:
    """Open a folder as transformers does: an adapter, the file that config.json names, the whole file, the shards."""
    if (folder / ADAPTER).exists() and (folder / ADAPTER_CONFIG).exists():
        return _single(folder, folder / ADAPTER, folder, adapter=True)
    named = read_table(folder / CONFIG).get("transformers_weights") if (folder / CONFIG).is_file() else None
    if named is not None:
        if not isinstance(named, str) or Path(named).name != named or not (folder / named).is_file():
            raise DataError(f"{folder / CONFIG}: transformers_weights is {named!r}, which is not a file in this folder")
        if named.endswith(".index.json"):
            return ModelFiles(folder, folder, _read_index(folder / named))
        return _single(folder, folder / named, folder)
    if (folder / WEIGHTS).exists():
        return _single(folder, folder / WEIGHTS, folder)
    if (folder / INDEX).exists():
        return ModelFiles(folder, folder, _read_index(folder / INDEX))
    if (folder / DIFFUSERS).exists():
        return _single(folder, folder / DIFFUSERS, folder)
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        if indices[0].name.startswith(ADAPTER):
            raise DataError(
                f"{folder} is an adapter in shards, which PEFT does not read: save it again as one {ADAPTER}"
            )
        return ModelFiles(folder, folder, _read_index(indices[0]))
    found = sorted(folder.glob("*.safetensors"))
    if found and all(SHARD.fullmatch(file.name) for file in found):
        counts = {int(match[1]) for file in found if (match := SHARD.fullmatch(file.name))}
        if counts != {1} or len(found) > 1:
            raise DataError(
                f"{folder} has {len(found)} of {max(counts)} shards and no {INDEX}, which lists their tensors: fetch "
                "the whole folder"
            )
    if len(found) == 1:
        return _single(folder, found[0], folder)
    if found:
        raise DataError(f"{folder} has {len(found)} safetensors files and no {INDEX}: name one of them")
    if (folder / PIPELINE).is_file():
        parts = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and any(entry.glob("*.safetensors")))
        raise DataError(
            f"{folder} is a pipeline of several models: merge its parts one by one, e.g. {folder / parts[0]}"
            if parts
            else f"{folder} is a pipeline of several models, none of which has safetensors"
        )
    endings = {file.suffix for file in folder.iterdir()}
    if endings & PICKLES:
        raise DataError(f"{folder} has weights only as pickles, which can run code: convert them to safetensors first")
    for ending, what in OTHERS.items():
        if ending in endings:
            raise DataError(f"{folder} has weights as {what}")
    raise DataError(f"{folder} is not a model folder: it has neither {WEIGHTS} nor {INDEX} nor {ADAPTER}")


def _single(path: Path, file: Path, folder: Path | None, adapter: bool = False) -> ModelFiles:
    return ModelFiles(path, folder, dict.fromkeys(read_header(file), file), adapter)


def _read_index(path: Path) -> dict[str, Path]:
    """Return the shard of each tensor, from the contents of the shards in the index, whose own entries may be stale.

    If two shards hold a tensor, the later one counts, as in transformers. An index cannot name files outside its
    folder.
    """
    table = read_table(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise DataError(f"{path} is not an index of shards: it has no weight_map")
    said: dict[str, Path] = {}
    for name, file in cast("dict[str, Any]", table).items():
        if not isinstance(file, str) or Path(file).name != file:
            raise DataError(f"{path}: tensor {name!r} should be in {file!r}, which is not a file in this folder")
        said[name] = path.parent / file
    where: dict[str, Path] = {}
    for file in sorted({*said.values()}):
        if not file.is_file():
            raise DataError(f"{path} names {file.name}, which is missing; is the download complete?")
        where |= dict.fromkeys(read_header(file), file)
    for name, file in said.items():
        if name not in where:
            raise DataError(f"{path}: the index has tensor {name!r} in {file.name}, which does not hold it")
    return where
