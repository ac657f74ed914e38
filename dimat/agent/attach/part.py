"""Which part of a user's model is exchanged: all, or adapters on a frozen base.

Adapters get the same protections as tasks with LoRA: frozen tensors stay here and are compared by their hash, factors
are merged as the products that they represent, and kinds of adapters that cannot be merged this way are refused.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from dimat.errors import ConfigError, MergeError
from dimat.merge.lora.factors import FACTOR, find_pairs
from dimat.merge.lora.kinds import MERGED, why_not
from dimat.tasks.huggingface.lora import MERGE_STAGES, KeepNames, frozen_hash, refuse_batchnorm

PLACES = ("fourierft_scaling", "indices", "shira_indices", "token_indices", "is_feedforward")
"""Attributes of PEFT's layers, in no state dict, that say where and how strongly what is trained counts."""
FACTORS = re.compile(r"(^|[._])(lora|lokr|hada|vera|oft|boft)_", re.IGNORECASE)
"""Names of factors of adapters, of any library."""


@dataclass(frozen=True)
class Part:
    """The exchanged part of a model. `names`: tensors of its state dict, None for all; `base_hash` and
    `merge_stages`: as a task's."""

    names: frozenset[str] | None = None
    base_hash: str = ""
    merge_stages: Mapping[str, str] | None = field(default=None)

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if more of the model trains than is exchanged."""
        if self.names is None:
            return
        more = [name for name, p in model.named_parameters() if p.requires_grad and name not in self.names]
        if more:
            raise ConfigError(
                f"{more[0]} trains now, and was frozen when the model was attached; agents exchange what trained then. "
                "When you attach the model, let everything be trainable that will ever train"
            )

    @contextmanager
    def alone(self, model: nn.Module) -> Generator[None]:
        """Context in which the model's state dict holds only this part."""
        if self.names is None:
            yield
            return
        handle = model.register_state_dict_post_hook(KeepNames(self.names))
        try:
            yield
        finally:
            handle.remove()


def part_of(model: nn.Module) -> Part:
    """Return which part of a model is exchanged.

    ConfigError for adapters that cannot be merged, and for a base whose statistics would change in training.
    """
    named = list(model.named_parameters())
    trained = [name for name, p in named if p.requires_grad]
    kinds = _kinds(model)
    factors = [name for name in trained if FACTOR.fullmatch(name)]
    strange = [name for name in trained if FACTORS.search(name) and name not in factors]
    if not kinds and not factors and not strange:
        return Part()
    for kind in kinds:
        if why := why_not(kind):
            raise ConfigError(
                f"the model has adapters of kind {kind}, which dimat cannot merge: {why}. It merges "
                f"{', '.join(sorted(MERGED))}; train one of these, or the whole model"
            )
    if strange:
        raise ConfigError(
            f"{strange[0]} looks like a part of an adapter, and dimat cannot tell how to merge it: factors are read by "
            "PEFT's names (<module>.lora_A.weight, <module>.lora_B.weight); name them so, or train the whole model"
        )
    if len(trained) == len(named):
        raise ConfigError("the model has adapters, and its base is not frozen; freeze it, or remove the adapters")
    try:
        find_pairs(factors)
    except MergeError as error:
        raise ConfigError(f"the model's adapters: {error}") from error
    refuse_batchnorm(model, "the model")
    held = dict(model.state_dict(keep_vars=True))
    frozen = [(name, tensor) for name, tensor in held.items() if name not in trained and isinstance(tensor, Tensor)]
    return Part(frozenset(trained), frozen_hash(_scales(model), frozen), MERGE_STAGES)


def _plain(value: Any) -> Any:
    """Return tensors in a value as lists, mappings as sorted pairs."""
    if isinstance(value, Mapping):
        return [(key, _plain(each)) for key, each in sorted(cast("Mapping[str, Any]", value).items())]
    return value.tolist() if isinstance(value, Tensor) else value


def _kinds(model: nn.Module) -> set[str]:
    """Return the kinds of adapters that PEFT has put into a model, by its names; DoRA is a kind of its own."""
    configs: Any = getattr(model, "peft_config", None)
    found: set[str] = set()
    for config in cast("Mapping[str, Any]", configs).values() if isinstance(configs, Mapping) else ():
        kind: Any = getattr(config, "peft_type", "")
        dora = bool(getattr(config, "use_dora", False))
        found.add("DoRA" if dora else str(getattr(kind, "value", kind)))
    return found


def _scales(model: nn.Module) -> str:
    """Say by what adapters are multiplied and where they act, which all agents must have in common."""
    said: list[str] = []
    for name, module in model.named_modules():
        scaling: Any = getattr(module, "scaling", None)
        if isinstance(scaling, Mapping) and hasattr(module, "lora_A"):
            said.append(f"{name} {sorted(cast('Mapping[str, float]', scaling).items())!r}")
        for key in PLACES if hasattr(module, "base_layer") else ():
            value: Any = getattr(module, key, None)
            if isinstance(value, Mapping | bool):
                said.append(f"{name} {key} {_plain(value)!r}")
    return "lora " + "; ".join(said)
