"""The architecture of the models, and inputs, for merges that run them.

The architecture is the user's own code, a hook; data are a safetensors file of stacked examples, or also a hook.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dimat.config import TaskConfig
from dimat.errors import ConfigError, DataError, HookError
from dimat.hooks import load_hook, user_code
from dimat.merge.align.none import none as no_alignment
from dimat.merge.models.batches import as_data, device_of, first_inputs, on_device
from dimat.merge.models.functional import aliases
from dimat.merge.registry import align_registry
from dimat.merge.repair.none import none as no_repair
from dimat.merge.stages import Data, Inputs, Weights
from dimat.merge_files.files import ModelFiles, differences, hash_of, told
from dimat.merge_files.model_config import check_architecture
from dimat.merge_files.recipe import Recipe
from dimat.merge_files.tied import is_computed
from dimat.registry import Bound
from dimat.seeds import torch_generator
from dimat.symmetry import SymmetrySpec, derive_symmetry
from dimat.tasks import input_batches, list_tasks, load_task
from dimat.tasks.base import Task
from dimat.weights.header import TensorInfo, read_header

BATCH = 256
"""Examples per batch of a data file."""

RUNS = {"data", "observer"}
"""Context of methods that run the models."""

GROUPS = {"spec", "observer"}
"""Context of methods that can use symmetry groups; some do without."""


@dataclass(frozen=True)
class Network:
    """A model's architecture, in evaluation mode and of type `dtype`, and batches of its inputs. `spec`: its symmetry
    groups if needed; `sources`: blake3 by file of the user's code and data; `tied`: omitted names, with the name that
    has their values."""

    model: nn.Module
    dtype: torch.dtype
    data: Data | None = None
    spec: SymmetrySpec | None = None
    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    tied: Mapping[str, str] = field(default_factory=dict[str, str])

    def complete(self, weights: Weights) -> dict[str, Tensor]:
        """Return weights under all names of the model: tied ones under each of their names, and buffers that follow
        from the config, which some files omit, from the model."""
        names = aliases(self.model)
        stored = {names.get(name, name): name for name in weights}
        stored |= {name: twin for name, twin in self.tied.items() if twin in weights}
        found = {name: weights[name] for name in weights}
        for name, tensor in self.model.state_dict().items():
            if name not in found:
                source = stored.get(names.get(name, name), stored.get(name))
                found[name] = tensor if source is None else weights[source]
        return found

    @property
    def coverage(self) -> str:
        """Return a description of the units that can be aligned."""
        if self.spec is None or not self.spec.groups:
            return "no symmetry groups are known: nothing is aligned"
        groups, share = len(self.spec.groups), self.spec.coverage
        return f"{groups} groups of units, {share:.0%} of the movable entries in the parameters move"


def runs_models(recipe: Recipe, methods: Sequence[Bound[Weights]]) -> list[str]:
    """Return the settings of a recipe that run the models; nothing if tensors are merged one by one."""
    found: list[str] = []
    if align_registry.get(recipe.align.name) is not no_alignment:
        found.append(f"align = {recipe.align.name!r}")
    found += [f"method {name!r}" for name in dict.fromkeys(method.name for method in methods if runs(method))]
    if recipe.repair.name != no_repair.__name__:
        found.append(f"repair = {recipe.repair.name!r}")
    return found


def open_network(
    recipe: Recipe, methods: Sequence[Bound[Weights]], own: ModelFiles, tied: Mapping[str, str], device: torch.device
) -> Network | None:
    """Return the network and data for the recipe's models, checked against the first model's tensors and config; None
    if nothing runs them. `tied`: the first model's names for the tensor of another name.

    Raises ConfigError if the recipe lacks model or data, HookError (a hook that fails or returns something else),
    DataError (tensors that are not the model's, data that it cannot run on).
    """
    why = runs_models(recipe, methods)
    if recipe.model is None:
        if why:
            raise ConfigError(f"{why[0]} runs the models: give their architecture with --model, a hook")
        if recipe.data is not None:
            raise ConfigError("data need a model that is run on them: also give its architecture with --model")
        return None
    model = _model_of(recipe)
    check_tensors(model, own, tied, recipe.model)
    check_architecture(model, recipe.model, own)
    if not why:
        return None
    if recipe.data is None:
        raise ConfigError(f"{why[0]} runs the models on data: give inputs with --data, a safetensors file or a hook")
    types = [info.dtype for info in own.infos.values() if info.dtype.is_floating_point]
    kind = torch.float64 if torch.float64 in types else torch.float32
    model = model.to(device=device, dtype=kind).eval()
    data, sources = _data_of(recipe, kind)
    inputs = first_inputs(data)
    _try_out(model, inputs, recipe.data)
    spec = None
    if align_registry.get(recipe.align.name) is not no_alignment or any(method.asks & GROUPS for method in methods):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are in the spec, and told as notes
            spec = derive_symmetry(model, inputs)
    if recipe.model.rpartition(":")[0].endswith(".py"):
        file = Path(recipe.folder) / recipe.model.rpartition(":")[0]
        sources = {str(file): {file.name: hash_of(file)}, **sources}
    return Network(model, kind, data, spec, sources, tied)


def runs(method: Bound[Weights]) -> bool:
    """Tell whether a combine method runs the models."""
    return bool(method.asks & RUNS)


def hook_result(spec: str, folder: str, what: str) -> Any:
    """Return a hook's result, or the bundled task of that name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a hook may draw its initial weights from the global generator
        if spec in list_tasks():
            return load_task(TaskConfig(name=spec))
        function = load_hook(spec, Path(folder), what)
        with user_code(f"{what} {spec!r} failed"):
            return function()


def _model_of(recipe: Recipe) -> nn.Module:
    """Return the architecture: a hook's module, the first element of its result, or its task's model."""
    spec = recipe.model or ""
    made = hook_result(spec, recipe.folder, "model hook")
    if isinstance(made, Task):
        with user_code(f"task of {spec!r} failed"):
            return made.build_model(torch_generator(0, "merging", "model"))
    if isinstance(made, tuple) and made:
        made = cast("tuple[Any, ...]", made)[0]
    if not isinstance(made, nn.Module):
        raise HookError(f"model hook {spec!r} must return a torch.nn.Module (or a Task), not {type(made).__name__}")
    return made


def check_tensors(model: nn.Module, own: ModelFiles, tied: Mapping[str, str], hook: str) -> None:
    """Check that a model's state dict has the first model's tensors; DataError with the number of differences and the
    first ten.

    The first model may lack other names of a tensor, and buffers that follow from the config.
    """
    infos = {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in model.state_dict().items()}
    names = aliases(model)
    held = {names.get(name, name) for name in own.infos} | tied.keys()
    spared = {name for name in infos if names.get(name, name) in held or name in held or is_computed(name, infos[name])}
    infos = {name: info for name, info in infos.items() if name in own.infos or name not in spared}
    found = differences(own.infos, str(own.path), infos, f"the model {hook!r}")
    if found:
        raise DataError(f"{own.path} does not fit the model {hook!r}, {told(found)}")


def _data_of(recipe: Recipe, kind: torch.dtype) -> tuple[Data, dict[str, Mapping[str, str]]]:
    """Return batches of inputs, floating-point ones in type `kind`, and the hash of their file."""
    spec = recipe.data or ""
    path = Path(spec)
    if path.suffix == ".safetensors" or path.exists():
        stacked = read_data(path)
        made: Any = _batched(stacked, recipe.seed)
        sources: dict[str, Mapping[str, str]] = {spec: {path.name: hash_of(path)}}
    elif ":" in spec or spec in list_tasks():
        made, sources = hook_result(spec, recipe.folder, "data hook"), {}
        if isinstance(made, Task):
            made = input_batches(made.data("probe"), BATCH, torch_generator(recipe.seed, "merging", "data"))
        elif isinstance(made, Tensor):
            made = _batched([made], recipe.seed)
        if isinstance(made, str | bytes | Mapping) or not hasattr(made, "__iter__"):
            kind_of = type(made).__name__
            raise HookError(f"data hook {spec!r} must return a tensor of inputs or batches of them, not {kind_of}")
    else:
        raise DataError(f"no data {spec}: give a safetensors file of inputs, or a hook, module:function")
    read = as_data(made)
    assert read is not None
    for batch in read:
        if not batch or not all(isinstance(cast("Any", x), Tensor) and x.ndim for x in batch):
            raise HookError(f"data hook {spec!r} must return batches of tensors, examples along the first axis")
        break
    return _Converted(read, kind), sources


def read_data(path: Path) -> list[Tensor]:
    """Return the arguments of a model, examples stacked along the first axis, in the order of their names."""
    if not path.is_file():
        raise DataError(f"no data {path}: give a safetensors file of inputs, or a hook, module:function")
    opened = ModelFiles(path, None, dict.fromkeys(read_header(path), path))
    tensors = {name: opened[name] for name in sorted(opened, key=_natural)}
    lengths = {name: len(t) if t.ndim else 0 for name, t in tensors.items()}
    if len({*lengths.values()}) != 1 or 0 in lengths.values():
        listed = ", ".join(f"{name!r} {n}" for name, n in lengths.items())
        raise DataError(f"{path}: inputs must have equally many examples along the first axis, and some: {listed}")
    return [*tensors.values()]


def _natural(name: str) -> tuple[str, int, str]:
    """Order input.2 before input.10."""
    stem, _, last = name.rpartition(".")
    return (stem, int(last), "") if last.isdecimal() else (name, -1, name)


def _batched(stacked: Sequence[Tensor], seed: int) -> list[Inputs]:
    """Return batches in random order, since passes over the data may stop early."""
    order = torch.randperm(len(stacked[0]), generator=torch_generator(seed, "merging", "data"))
    return [tuple(x[part] for x in stacked) for part in order.split(BATCH)]


class _Converted:
    """Batches whose floating-point tensors have one type."""

    def __init__(self, data: Data, kind: torch.dtype) -> None:
        self._data = data
        self._kind = kind

    def __iter__(self) -> Any:
        for batch in self._data:
            yield tuple(x.to(self._kind) if x.is_floating_point() else x for x in batch)


def _try_out(model: nn.Module, inputs: Inputs, data: str) -> None:
    """Run the model on one or two examples, so that data that are not its inputs are reported before anything is
    merged."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(*on_device(tuple(x[:2] for x in inputs), device_of(model)))
    except Exception as error:  # a user's code may fail in any way
        shapes = ", ".join(str([*x.shape[1:]]) for x in inputs)
        cause = (str(error).strip().splitlines() or [""])[0]
        raise DataError(
            f"the model cannot run on {data}, examples of shape {shapes}: {type(error).__name__}: {cause}"
        ) from error
