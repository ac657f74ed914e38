"""Models on disk: a safetensors file, indexed shards, a Hugging Face or PEFT adapter folder."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dimat.errors import DataError
from dimat.merge.lora.kinds import PLACES, why_not
from dimat.merge.natures import is_constant
from dimat.reading import read_table
from dimat.weights.header import NAMES, TensorInfo, parse_header, read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DIFFUSERS = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
CARRIED = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
"""Suffixes of the files beside the weights that belong to a model: config, tokenizer, model code."""

SHOWN = 10
"""Number of differences between models that are listed."""


class ModelFiles(Mapping[str, Tensor]):
    """A model's tensors by name, in the files' order; each access maps one tensor, and nothing is cached.

    `path`: as given; `folder`: that of a model folder, else None; `files`: those with tensors; `infos`: types and
    shapes by name. A tensor's values are checked when it is first read: DataError if they are not finite.
    """

    def __init__(self, path: Path, folder: Path | None, where: Mapping[str, Path], adapter: bool = False) -> None:
        self.path = path
        self.folder = folder
        self.adapter = adapter
        self.files = tuple(dict.fromkeys(where.values()))
        headers = {file: read_header(file) for file in self.files}
        self.infos: dict[str, TensorInfo] = {}
        for name, file in where.items():
            if name not in headers[file]:
                raise DataError(f"{path}: the index has tensor {name!r} in {file.name}, which does not hold it")
            self.infos[name] = headers[file][name]
        if not self.infos:
            raise DataError(f"{path} holds no tensors")
        self._where = dict(where)
        self._rows: Mapping[str, Tensor] = {}
        self._aliases: Mapping[str, str] = {}
        self._dtype: torch.dtype | None = None
        self._opened: dict[Path, Any] = {}
        self._checked: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        file = self._where[name]
        stored = self._aliases.get(name, name)
        try:
            if file not in self._opened:
                self._opened[file] = safe_open(file, framework="pt")
            tensor: Tensor = self._opened[file].get_tensor(stored)
        except (OSError, SafetensorError) as error:
            raise DataError(f"cannot read tensor {name!r} from {file}: {error}") from error
        if self._dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(self._dtype)  # before the check: what a narrow type cannot hold becomes infinite
        if name not in self._checked:
            _check_finite(tensor, name, file)
            self._checked.add(name)
        return tensor if name not in self._rows else tensor[self._rows[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._where  # without reading the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def read_in(self, dtype: torch.dtype) -> ModelFiles:
        """Return the same model with its floating-point tensors rounded to a type when they are read."""
        model = copy(self)
        model._dtype = dtype
        model._checked = set()
        model.infos = {
            name: replace(info, dtype=dtype) if info.dtype.is_floating_point else info
            for name, info in self.infos.items()
        }
        return model

    def with_rows(self, rows: Mapping[str, Tensor]) -> ModelFiles:
        """Return the same model with the rows of some tensors in another order: row i is the stored `rows[name][i]`."""
        model = copy(self)
        model._rows = dict(rows)
        return model

    def seen_as(self, names: Collection[str], aliases: Mapping[str, str]) -> ModelFiles:
        """Return the same model with only these tensors; `aliases`: stored tensor by its additional name."""
        model = copy(self)
        model._aliases = dict(aliases)
        model._where = {name: self._where[aliases.get(name, name)] for name in names}
        model.infos = {name: self.infos[aliases.get(name, name)] for name in names}
        return model

    @cached_property
    def config(self) -> dict[str, Any]:
        """The folder's config.json; nothing if there is none. DataError if it is damaged."""
        path = None if self.folder is None else self.folder / CONFIG
        return read_table(path) if path is not None and path.is_file() else {}

    def hashes(self) -> dict[str, str]:
        """Return the blake3 of each file that holds tensors, by its name."""
        return {file.name: hash_of(file) for file in self.files}

    def carried(self) -> list[Path]:
        """Return the files of a model folder that accompany the weights: config, tokenizer, model code, licence."""
        if self.folder is None:
            return []
        return sorted(
            file
            for file in self.folder.iterdir()
            if file.is_file()
            and not file.name.startswith(".")
            and not file.name.endswith(".index.json")
            and (file.suffix in CARRIED or file.name.startswith(("LICENSE", "NOTICE")))
        )


def hash_of(file: Path) -> str:
    """Return the blake3 of a file."""
    return blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest()


def check_alike(models: Sequence[ModelFiles], apart: Collection[str] = ()) -> None:
    """Check that all models have the tensors of the first, with its shapes; integers, reals and complex do not mix.

    Tensors named in `apart` may differ. Raises DataError with the number of differences and the first ten in full.
    """
    first, found = models[0], list[str]()
    for other in models[1:]:
        mine, theirs = ({n: i for n, i in m.infos.items() if n not in apart} for m in (first, other))
        found += differences(mine, str(first.path), theirs, str(other.path))
    tell_differences(found)


def differences(first: Mapping[str, TensorInfo], where: str, other: Mapping[str, TensorInfo], there: str) -> list[str]:
    """Describe tensors that differ in shape or kind between two places, or are in only one of them."""
    found: list[str] = []
    for name, info in first.items():
        theirs = other.get(name)
        if theirs is None:
            found.append(f"{name!r} is missing from {there}")
        elif theirs.shape != info.shape or _kind(theirs.dtype) != _kind(info.dtype):
            found.append(f"{name!r} is {info} in {where}, {theirs} in {there}")
    return found + [f"{name!r} is only in {there}" for name in other if name not in first]


def told(found: Sequence[str]) -> str:
    """Return differences in one line: their number and the first ten."""
    more = f"; and {len(found) - SHOWN:,} more" if len(found) > SHOWN else ""
    return f"{len(found):,} difference{'s' if len(found) > 1 else ''}: {'; '.join(found[:SHOWN])}{more}"


def tell_differences(found: Sequence[str]) -> None:
    """Raise DataError that describes the differences between models, if there are any."""
    if found:
        raise DataError(f"the models do not fit together, {told(found)}")


def check_formats(models: Sequence[ModelFiles]) -> str:
    """Return of which library's form the tensors are, as files say it: "pt" (PyTorch) where none does.

    Raises DataError where they say different ones: the axes of the same weights are in another order there.
    """
    said: dict[str, str] = {}
    for model in models:
        for file in model.files:
            with file.open("rb") as opened:
                said.setdefault(parse_header(opened, str(file)).metadata.get("format", "pt"), str(file))
    if len(said) > 1:
        (one, first), (two, other) = [*said.items()][:2]
        raise DataError(
            f"{first} is of format {one!r}, {other} of {two!r}: libraries order the axes of weights differently; "
            "convert both to one"
        )
    return next(iter(said))


def check_factors(models: Sequence[ModelFiles]) -> None:
    """Check that adapters can be merged, and have equal scales if their factors are merged one by one."""
    models = [model for model in models if model.adapter]
    settings = [read_table(model.path / ADAPTER_CONFIG) for model in models]
    kinds = [str(setting.get("peft_type") or "LORA") for setting in settings]
    for model, kind in zip(models, kinds):
        if why := why_not(kind):
            raise DataError(
                f"{model.path} is an adapter of kind {kind}: {why}; merge each adapter into its base model with PEFT "
                "first"
            )
    scales = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
    for key in dict.fromkeys(("peft_type", *scales, *(key for kind in kinds for key in PLACES.get(kind, ())))):
        for model, setting in zip(models[1:], settings[1:]):
            if (setting.get(key) or None) != (settings[0].get(key) or None):  # False and {} are as good as left out
                plain = key in scales and key != "use_dora" and {*kinds} == {"LORA"}
                raise DataError(
                    f"adapters differ in {key!r}: {settings[0].get(key)!r} in {models[0].path}, "
                    f"{setting.get(key)!r} in {model.path}; merge "
                    + ("their products with --method lora-svd" if plain else "them into their base models first")
                )
    for model, setting, kind in zip(models, settings, kinds):
        if len(models) > 1 and kind == "SHIRA" and setting.get("random_seed") is None:
            raise DataError(
                f"{model.path} does not say which entries it trains (random_seed is not set); merge each adapter into "
                "its base model with PEFT first"
            )
        if setting.get("use_dora") or any("lora_magnitude_vector" in name for name in model):
            raise DataError(
                f"{model.path} is DoRA: its magnitudes scale the base's weights too, so that factors cannot be merged "
                "one by one; merge each adapter into its base model with PEFT first"
            )


def adapter_notes(models: Sequence[ModelFiles], *, products: bool) -> list[str]:
    """Return notes on a merge of adapters: different bases, and factors that are merged one by one."""
    settings = [read_table(model.path / ADAPTER_CONFIG) for model in models if model.adapter]
    named = (setting.get("base_model_name_or_path") for setting in settings)
    bases = sorted({str(name) for name in named if name})
    notes = [f"the adapters name different base models: {', '.join(bases)}"] if len(bases) > 1 else []
    if not any("lora_A" in name for name in models[0]) or len(models) < 2:
        return notes
    if len(settings) < len(models):
        notes.append(
            f"factors of LoRA without an {ADAPTER_CONFIG} beside them are merged as if all models had one scale"
        )
    if not products:
        notes.append(
            "adapters: factors are merged one by one, which is not the merge of their products; for that take "
            "--method lora-svd"
        )
    return notes


def _kind(dtype: torch.dtype) -> tuple[bool, bool]:
    return dtype.is_floating_point, dtype.is_complex


def _check_finite(tensor: Tensor, name: str, file: Path) -> None:
    if not any(_kind(tensor.dtype)) or not tensor.numel():
        return
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    values = values.float() if values.element_size() == 1 else values
    low, high = torch.aminmax(values)  # both are NaN where one value is
    if not (torch.isfinite(low) and torch.isfinite(high)) and not is_constant(name, tensor):
        count = int((~torch.isfinite(values)).sum())
        raise DataError(f"{file}: tensor {name!r} holds {count:,} values that are not finite in {NAMES[tensor.dtype]}")
