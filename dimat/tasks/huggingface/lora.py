"""LoRA (arXiv 2106.09685): a frozen base that agents share, adapters that they train.

An adapted model's state dict holds the trained tensors and nothing else. So all code that reads state dicts (snapshots,
merges, checkpoints, evaluation at other weights) handles only the adapters; the base stays in the model, untouched. Hu
et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2022.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from dimat.errors import ConfigError, DimatError, first_line
from dimat.tasks.huggingface.library import library
from dimat.tasks.huggingface.options import LoraOptions

MERGE_STAGES = {"align": "none", "combine": "lora-svd", "repair": "none"}
"""The stages that merge adapters: in the space of their products. Units are not moved, as the base does not move."""


class KeepNames:
    """A hook that keeps only the tensors of these names in a state dict."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = frozenset(names)

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in [n for n in state if n.startswith(prefix) and n.removeprefix(prefix) not in self.names]:
            del state[name]


def adapt(base: nn.Module, options: LoraOptions, heads: Collection[str] = (), option: str = "model.lora") -> nn.Module:
    """Freeze a model, add adapters, and return it with a state dict of the trained tensors.

    The first factors are drawn from torch's global generator, the second are 0. `heads`: modules that are trained
    whole, such as a new classifier; `option`: the key of `options` as the user wrote it.

    Raises ConfigError for targets that the model does not have, and for a model with BatchNorm, whose statistics would
    change in a base that must not change.
    """
    refuse_batchnorm(base, f"task.options.{option}")
    peft = library("peft")
    targets = list(options.targets) if isinstance(options.targets, tuple) else options.targets
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that GPT-2's weights are transposed, which PEFT then sees to
            adapted = peft.get_peft_model(
                base,
                peft.LoraConfig(
                    r=options.r,
                    lora_alpha=options.alpha,
                    lora_dropout=options.dropout,
                    target_modules=targets,
                    modules_to_save=sorted(heads) or None,
                    bias="none",
                ),
            )
    except ValueError as error:
        raise ConfigError(f"task.options.{option}.targets: {first_line(error)}") from error
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    adapted.register_state_dict_post_hook(KeepNames(trained))
    return adapted


def refuse_batchnorm(base: nn.Module, where: str) -> None:
    """Raise ConfigError, which begins with `where`, for a base whose statistics training would change."""
    for name, module in base.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            raise ConfigError(
                f"{where}: {name} is a BatchNorm, and training would change its statistics in the frozen base; take a "
                "model without BatchNorm, or leave lora out"
            )


def head_names(model: Any) -> list[str]:
    """Return the children of a classifier outside its pretrained body that have parameters."""
    body = model.base_model_prefix
    return [name for name, child in model.named_children() if name != body and any(True for _ in child.parameters())]


def share_frozen(model: nn.Module, held: dict[str, Tensor]) -> None:
    """Let an adapted model use the memory of the frozen tensors in `held` instead of its own, and add the missing ones
    to `held`. Buffers are not shared: a model may compute them anew.

    Raises DimatError if one differs from the model's own: some code has written into a tensor that must not change.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        own = parameter.detach()
        shared = held.setdefault(name, own)
        if not torch.equal(shared, own):
            raise DimatError(f"{name} of the frozen base has changed since it was made; no code may write into it")
        parameter.data = shared


def frozen_part(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return everything in an adapted model that is not trained, buffers too."""
    return [*((name, p) for name, p in model.named_parameters() if not p.requires_grad), *model.named_buffers()]


def frozen_hash(said: str, frozen: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hex blake3 of frozen tensors by name, and of `said`, the adapters' scale as text: agents with equal
    hashes can merge adapters."""
    hasher = blake3(said.encode())
    for name, tensor in sorted(frozen, key=lambda pair: pair[0]):
        plain = tensor.detach().to("cpu").contiguous()
        hasher.update(f"\n{name} {tuple(plain.shape)} {plain.dtype}\n".encode())
        hasher.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
