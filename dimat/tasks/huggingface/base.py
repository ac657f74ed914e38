"""Makes the models of the Hugging Face tasks, with or without adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from dimat.errors import ConfigError
from dimat.registry import OptionNames
from dimat.seeds import torch_generator
from dimat.tasks.huggingface.lora import MERGE_STAGES, adapt, frozen_hash, frozen_part, head_names, share_frozen
from dimat.tasks.huggingface.models import Architecture
from dimat.tasks.huggingface.options import ModelOptions
from dimat.tasks.models import seeded


@dataclass(frozen=True)
class ModelMaker:
    """Makes a task's models, with adapters if the options have `lora`.

    `names`: the options' keys as the user wrote them. `seed`: draws the frozen base of adapters if it has no pretrained
    weights, or a new classifier, so that all agents have the same. Models with adapters share the memory of their
    frozen tensors as long as they stay on the CPU, so that N agents in a process need one base and N sets of adapters.

    Raises ConfigError if `dtype` is set for weights that are trained.
    """

    architecture: Architecture
    options: ModelOptions
    names: OptionNames
    seed: int = 0
    _frozen: dict[str, Tensor] = field(default_factory=dict[str, Tensor], init=False, repr=False, compare=False)
    """Frozen tensors by name, shared by all models of this maker: they are equal, and never change."""

    def __post_init__(self) -> None:
        if self.options.lora is None and self.options.dtype != "fp32":
            raise ConfigError(
                f"task.options.{self.names('model.dtype')} is for the frozen base of lora; trained weights are fp32 "
                "(see train.precision)"
            )

    def build(self, generator: torch.Generator) -> nn.Module:
        """Return a model; its random values are drawn from the generator."""
        lora = self.options.lora
        if lora is None:
            return seeded(lambda: self.architecture.build())(generator)
        base = seeded(lambda: self.architecture.build(self.options.dtype))(torch_generator(self.seed, "hf", "base"))
        heads = head_names(base) if self.architecture.kind == "AutoModelForImageClassification" else ()
        model = seeded(lambda: adapt(base, lora, heads, self.names("model.lora")))(generator)
        share_frozen(model, self._frozen)
        return model

    @cached_property
    def base_hash(self) -> str:
        """A hash of the frozen base and the adapters' scale; empty without adapters."""
        lora = self.options.lora
        if lora is None:
            return ""
        frozen = frozen_part(self.build(torch.Generator().manual_seed(0)))
        return frozen_hash(f"lora r={lora.r} alpha={lora.alpha!r}", frozen)

    @property
    def merge_stages(self) -> Mapping[str, str] | None:
        """The stages in which adapters are merged; None without adapters."""
        return None if self.options.lora is None else MERGE_STAGES


class MadeByMaker:
    """Members of a task that its model's maker provides; see `dimat.tasks.Task`."""

    maker: ModelMaker

    @property
    def base_hash(self) -> str:
        """Identifies the frozen base; empty without adapters."""
        return self.maker.base_hash

    @property
    def merge_stages(self) -> Mapping[str, str] | None:
        """The stages in which adapters are merged; None without adapters."""
        return self.maker.merge_stages
