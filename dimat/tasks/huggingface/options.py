"""Options that the tasks of Hugging Face share, in groups: `data`, `model`, `probe`.

[task.options]
data = { name = "data/flowers", classes = ["daisy", "rose"] }
model = { name = "models/vit-base", lora = { r = 8 } }
probe = { name = "data/public", count = 100 }
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dimat.registry import OptionNames

NAMES = OptionNames()
Count = Annotated[int, Field(ge=1)]


class OptionGroup(BaseModel):
    """Base of the groups: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataOptions(OptionGroup):
    """Source of the examples.

    `name`: a file, a folder, or a name on the hub (`subset`: its configuration), with the splits `train_split` and
    `test_split`. `test`: another source, of test data; without any test data, `test_share` of the training data are
    used. `train_samples`, `test_samples`: use at most this many rows. `label_column`: the column of the classes.
    """

    name: str
    test: str | None = None
    subset: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    train_samples: Count | None = None
    test_samples: Count | None = None
    label_column: str | None = None


class LoraOptions(OptionGroup):
    """Adapters of low rank.

    `r`: rank; `alpha`: the product of the factors is scaled by alpha / r; `dropout`: before the first factor;
    `targets`: suffixes of the names of the adapted modules, "all-linear", or by default PEFT's choice for the model.
    """

    r: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: tuple[str, ...] | str | None = None


class ModelOptions(OptionGroup):
    """The model, and the part of it that is trained.

    `name`: a folder of a pretrained model or its name on the hub; weights are read from safetensors only. Or `config`:
    a folder, a config.json or a table such as { model_type = "vit", hidden_size = 64, … }, with random weights.
    `lora`: freezes the model; agents train and exchange adapters (and a classifier). `dtype`: of the frozen
    base.
    """

    name: str | None = None
    config: str | dict[str, Any] | None = None
    lora: LoraOptions | None = None
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"


MODEL = ModelOptions()


class ProbeOptions(OptionGroup):
    """The probe set: `count` examples of the training data, set aside; or, with `name`, at most `count` of a file, a
    folder or a data set of the hub (`subset`: its configuration, `split`: its split)."""

    count: Annotated[int, Field(ge=2)]
    name: str | None = None
    subset: str | None = None
    split: str | None = None


def moved_keys(data: type[DataOptions]) -> Mapping[str, str]:
    """Return the new places of the flat keys in older files: "test" → "data.test". `data`: the task's own group."""
    return MappingProxyType(
        {key: f"data.{key}" for key in data.model_fields if key != "name"}
        | {key: f"model.{key}" for key in ("config", "lora", "dtype")}
        | {f"probe_{old}": f"probe.{key}" for old, key in (("data", "name"), ("subset", "subset"), ("split", "split"))}
        | {"data": "data.name", "model": "model.name", "probe": "probe.count"}
    )
