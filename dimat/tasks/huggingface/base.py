"""What the tasks of Hugging Face have in common: how their models are made and merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from dimat.errors import ConfigError
from dimat.seeds import torch_generator
from dimat.tasks.huggingface.lora import MERGE_STAGES, LoraOptions, adapt, frozen_hash, head_names, share_frozen
from dimat.tasks.huggingface.models import Architecture
from dimat.tasks.models import seeded


@dataclass(frozen=True)
class ModelMaker:
    """Makes a task's models, with adapters where there is `lora`.

    `seed`: without pretrained weights, or with a new classifier, the frozen base of adapters is drawn with it, so that
    all agents have the same; `dtype`: the base's. Models with adapters share the memory of their frozen tensors as long
    as they stay on the CPU, so that N agents of a process hold one base and N times adapters.

    Raises ConfigError for a `dtype` of weights that are trained.
    """

    architecture: Architecture
    lora: LoraOptions | None = None
    dtype: str = "fp32"
    seed: int = 0
    _frozen: dict[str, Tensor] = field(default_factory=dict[str, Tensor], init=False, repr=False, compare=False)
    """Frozen tensors by name, which all models that this maker makes use: they are equal, and never change."""

    def __post_init__(self) -> None:
        if self.lora is None and self.dtype != "fp32":
            raise ConfigError(
                "task.options.dtype is for the frozen base of lora; trained weights are fp32 (see train.precision)"
            )

    def build(self, generator: torch.Generator) -> nn.Module:
        """Return a model; what is drawn in it comes from the generator."""
        if self.lora is None:
            return seeded(lambda: self.architecture.build())(generator)
        base = seeded(lambda: self.architecture.build(self.dtype))(torch_generator(self.seed, "hf", "base"))
        heads = head_names(base) if self.architecture.kind == "AutoModelForImageClassification" else ()
        model = seeded(_adapter(base, self.lora, heads))(generator)
        share_frozen(model, self._frozen)
        return model

    @cached_property
    def base_hash(self) -> str:
        """A hash of the frozen base and the adapters' scale; empty without adapters."""
        return "" if self.lora is None else frozen_hash(self.build(torch.Generator().manual_seed(0)), self.lora)

    @property
    def merge_stages(self) -> Mapping[str, str] | None:
        """The stages in which adapters are merged; None without adapters."""
        return None if self.lora is None else MERGE_STAGES


class MadeByMaker:
    """What a task says of its model that its maker knows; see `dimat.tasks.base.Task`."""

    maker: ModelMaker

    @property
    def base_hash(self) -> str:
        """Names the frozen base; empty without adapters."""
        return self.maker.base_hash

    @property
    def merge_stages(self) -> Mapping[str, str] | None:
        """The stages in which adapters are merged; None without adapters."""
        return self.maker.merge_stages


def _adapter(base: nn.Module, lora: LoraOptions, heads: list[str] | tuple[str, ...]) -> Callable[[], nn.Module]:
    return lambda: adapt(base, lora, heads)
