"""Models of transformers: pretrained (folder or hub), or drawn from a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dimat.errors import ConfigError, first_line, nearest
from dimat.registry import OptionNames
from dimat.tasks.huggingface.library import library, local_path, telling
from dimat.tasks.huggingface.options import ModelOptions

Kind = Literal["AutoModelForImageClassification", "AutoModelForCausalLM"]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Architecture:
    """A model that can be built: its configuration and, if it is pretrained, its weights.

    `option`: the key that describes it, as the user wrote it. `changes`: settings of the configuration that the task
    sets, e.g. the number of classes.
    """

    kind: Kind
    config: Any
    option: str
    weights: str | None = None
    local: bool = True
    changes: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def build(self, dtype: str = "fp32") -> nn.Module:
        """Return the model; random values are drawn from torch's global generator. Weights that the checkpoint lacks or
        has in another shape, such as a classifier for other classes, are drawn."""
        maker = getattr(library("transformers"), self.kind)
        if self.weights is None:
            try:
                return maker.from_config(self.config, dtype=TYPES[dtype])
            except Exception as error:  # sizes that do not fit each other fail anywhere in a model
                raise ConfigError(
                    f"task.options.{self.option}: no such model can be made: {first_line(error)}"
                ) from error
        with telling(self.option, self.weights, self.local):
            return maker.from_pretrained(
                self.weights,
                config=self.config,
                dtype=TYPES[dtype],
                ignore_mismatched_sizes=self.kind == "AutoModelForImageClassification",
                use_safetensors=True,
                local_files_only=self.local,
                trust_remote_code=False,
            )


def architecture(
    kind: Kind, model: ModelOptions, names: OptionNames, folder: Path, changes: Mapping[str, Any]
) -> Architecture:
    """Return the architecture that is described by `model.name` or `model.config`, one of which is given.

    Raises ConfigError, DataError or NetworkError that names the option as the user wrote it (`names`).
    """
    pretrained, drawn = names("model.name"), names("model.config")
    if (model.name is None) == (model.config is None):
        raise ConfigError(
            f"give task.options.{pretrained} (pretrained) or task.options.{drawn} (random weights), one of them"
        )
    auto = library("transformers").AutoConfig
    if isinstance(model.config, Mapping):
        return Architecture(kind, _from_table(auto, model.config, changes, drawn), drawn, changes=changes)
    option, name = (pretrained, model.name) if model.config is None else (drawn, model.config)
    assert name is not None
    path = local_path(name, folder, option)
    where = name if path is None else str(path)
    with telling(option, where, path is not None):
        read = auto.from_pretrained(where, local_files_only=path is not None, trust_remote_code=False, **changes)
    return Architecture(kind, read, option, where if model.config is None else None, path is not None, changes)


def fits_kind(built: Architecture) -> None:
    """Raise ConfigError if transformers has no model of the kind for the architecture."""
    maker = getattr(library("transformers"), built.kind)
    if type(built.config) not in maker._model_mapping:
        what = "image classifier" if built.kind == "AutoModelForImageClassification" else "causal language model"
        raise ConfigError(f"transformers has no {what} of the type {built.config.model_type!r}; choose another model")


def _from_table(auto: Any, table: Mapping[str, Any], changes: Mapping[str, Any], option: str) -> Any:
    sizes = dict(table)
    kind = sizes.pop("model_type", None)
    if not isinstance(kind, str):
        raise ConfigError(f'task.options.{option} needs model_type, e.g. {{ model_type = "vit", hidden_size = 64 }}')
    known: list[str] = list(library("transformers").CONFIG_MAPPING.keys())
    if kind not in known:
        raise ConfigError(f"task.options.{option}: transformers has no model_type {kind!r}{nearest(kind, known)}")
    plain = auto.for_model(kind)
    for name in sizes:
        if not hasattr(plain, name):
            public = [key for key in plain.to_dict() if not key.startswith("_")]
            raise ConfigError(f"task.options.{option}: {kind} has no setting {name!r}{nearest(name, public)}")
    try:
        return auto.for_model(kind, **{**sizes, **changes})
    except Exception as error:  # each configuration checks its values in its own way
        raise ConfigError(f"task.options.{option}: {first_line(error)}") from error
