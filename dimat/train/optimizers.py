"""Optimizers and learning rates, from their configuration."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from dimat.config import LrScheduleConfig, OptimizerConfig
from dimat.errors import ConfigError, HookError, first_line, nearest
from dimat.hooks import load_hook

SHORT = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
WHERE = "train.optimizer"


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, precision: str = "fp32", folder: Path = Path()
) -> torch.optim.Optimizer:
    """Return the optimizer over the trainable parameters, in the model's order.

    `precision`: of the forward pass; `folder`: where hooks in files are looked up. Raises ConfigError for an unknown
    class or option, and for values that it does not accept; HookError for a hook that fails.
    """
    if ":" in config.name:
        return _from_hook(model, config, folder)
    parameters = [p for p in model.parameters() if p.requires_grad]
    kind = SHORT.get(config.name) or _class_of(config.name)
    given = {key: getattr(config, key) for key in ("lr", "momentum", "weight_decay") if key in config.model_fields_set}
    if config.name in SHORT:  # dimat's defaults, and what the class does not have is passed over
        given = {"lr": config.lr, "weight_decay": config.weight_decay}
        given |= {"momentum": config.momentum} if config.name == "sgd" else {}
    options = _options(kind, config.options, given)
    unfit = _unfit_for_fused(parameters, precision)
    if config.name in SHORT:
        # fused: one kernel for all of a step; on a CPU a third faster than the default for Adam on a small MLP
        options.setdefault("fused", not unfit and not options.get("foreach") and not options.get("differentiable"))
    if options.get("fused") and unfit:
        raise ConfigError(f"{WHERE}.options.fused: {unfit}; leave it out")
    try:
        return _uncompiled(kind)(parameters, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{WHERE}: {kind.__name__} cannot be made: {first_line(error)}") from error


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether each step evaluates the loss by itself, any number of times (LBFGS)."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def _unfit_for_fused(parameters: Sequence[nn.Parameter], precision: str) -> str:
    """Say why torch's fused steps would fail on these parameters, or ""."""
    if not {p.device.type for p in parameters} <= {"cpu", "cuda"}:
        return "fused steps exist only on a CPU and with CUDA"
    if not all(p.is_floating_point() for p in parameters):
        return "fused steps take real parameters only"
    if precision == "fp16":
        return "a first step that fp16 skips leaves the momentum of a fused step uninitialised"
    # the kernels run through memory, and a gradient is laid out as its parameter only where that has no gaps
    formats = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
    if not all(any(_laid_out(p, each) for each in formats) for p in parameters):
        return "fused steps are wrong on parameters with gaps in memory"
    return ""


def _laid_out(parameter: nn.Parameter, memory_format: torch.memory_format) -> bool:
    dims = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(memory_format, parameter.ndim)
    return parameter.ndim == dims and parameter.is_contiguous(memory_format=memory_format)


def _class_of(name: str) -> type[torch.optim.Optimizer]:
    """Return the optimizer class with a dotted name."""
    module, _, member = name.rpartition(".")
    try:
        kind: Any = getattr(import_module(module), member, None)
    except ImportError as error:
        raise ConfigError(f"{WHERE}.name {name!r}: cannot import {module} ({first_line(error)})") from error
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)) or kind is torch.optim.Optimizer:
        held = vars(import_module(module))
        known = [n for n, k in held.items() if isinstance(k, type) and issubclass(k, torch.optim.Optimizer)]
        raise ConfigError(f"{WHERE}.name {name!r} is not an optimizer class{nearest(member, known)}")
    return kind


def _options(function: Callable[..., Any], options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings (`given`) and options as keyword arguments, checked against a signature."""
    named = inspect.signature(function).parameters
    known = [key for key, p in named.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)][1:]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in named.values())
    what = getattr(function, "__name__", "it")
    for key in options:
        if key in given:
            raise ConfigError(f"{WHERE}: {key} is given twice, beside name and in options; give it beside name")
    for key in (*given, *options):
        if key not in known and not takes_all:
            listed = f"its options: {', '.join(sorted(known))}" if known else "it has none"
            raise ConfigError(f"{WHERE}: {what} has no option {key!r}{nearest(key, known)} ({listed})")
    # TOML has no tuples, and torch takes pairs as such
    return {**given, **{key: _pair(value) for key, value in options.items()}}


def _pair(value: Any) -> Any:
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


def _from_hook(model: nn.Module, config: OptimizerConfig, folder: Path) -> torch.optim.Optimizer:
    function = load_hook(config.name, folder, "optimizer hook")
    given = {key: getattr(config, key) for key in ("lr", "momentum", "weight_decay") if key in config.model_fields_set}
    options = _options(function, config.options, given)
    try:
        made = function(model, **options)
    except Exception as error:  # a user's code may fail in any way
        raise HookError(f"optimizer hook {config.name!r} failed: {first_line(error)}") from error
    if not isinstance(made, torch.optim.Optimizer):
        raise HookError(f"optimizer hook {config.name!r} returned a {type(made).__name__}, not a torch.optim.Optimizer")
    return made


@cache
def _uncompiled(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """Return one of torch's optimizers without the decorators that exclude it from torch.compile; others unchanged.

    The decorated methods load the compiler (a CPU-second, 100 MB) when they are first called, whether anything is
    compiled or not; what they compute is the same. Nothing here compiles an optimizer's step.
    """
    if not kind.__module__.startswith("torch.optim."):
        return kind
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    # an optimizer that is not differentiable makes its steps without gradients
    return type(kind.__name__, (kind,), {**methods, "step": torch.no_grad()(inspect.unwrap(kind.step))})


def lr_factor(schedule: LrScheduleConfig, progress: float) -> float:
    """Return the factor on the learning rate at `progress` in [0, 1] of the whole run."""
    if schedule.name == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule.name == "step":
        return schedule.gamma ** sum(progress >= milestone for milestone in schedule.milestones)
    return 1.0
