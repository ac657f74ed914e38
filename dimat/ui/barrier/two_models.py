"""Measures the loss barrier between two models on disk: `dimat barrier`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dimat.device import resolve_device
from dimat.errors import ConfigError, DataError, HookError
from dimat.hooks import user_code
from dimat.merge.barrier import Line, barrier
from dimat.merge.stages import Weights
from dimat.merge_files.architecture import BATCH, Network, check_tensors, hook_result, read_data
from dimat.merge_files.files import check_alike
from dimat.merge_files.folders import open_model
from dimat.merge_files.model_config import check_architecture, check_configs, check_whole
from dimat.merge_files.tied import bring_together
from dimat.seeds import torch_generator
from dimat.tasks import ClassificationTask, input_batches
from dimat.tasks.base import Task
from dimat.tasks.data import Subset, TensorData
from dimat.train.evaluation import evaluate


def barrier_of_files(
    one: Path,
    other: Path,
    model: str,
    data: str | None = None,
    *,
    align: Sequence[str],
    points: int,
    repair: str,
    examples: int,
    seed: int,
    device: str,
) -> tuple[list[Line], list[str]]:
    """Measure the loss on the line between two models on disk; return it by way of alignment, and notes for the user.

    `model`: a hook that returns a Task, or a model; or a bundled task's name. `data`: labelled examples, a safetensors
    file (the tensor that comes last by name has the classes) or a hook that returns batches (…, classes); by default
    the task's: its test set to measure on, its probe set to align on. `examples`: the most that are measured. Raises
    ConfigError for what is missing, DataError for models that cannot be read or do not fit, HookError, and the errors
    of `barrier`.
    """
    models = (open_model(one), open_model(other))
    for each in models:
        if each.adapter:
            raise ConfigError(f"{each.path} is an adapter, and a barrier runs whole models: merge it into its base")
        check_whole(each)
    notes = check_configs(models)
    together = bring_together(models, None)
    check_alike(together.models)
    task = _task(model, data, seed)
    network = task.build_model(torch_generator(0, "merging", "model"))
    check_tensors(network, together.models[0], together.tied, model)
    check_architecture(network, model, together.models[0])
    where = resolve_device(device, "device")
    network = network.to(where).eval()
    whole = Network(network, torch.float32, tied=together.tied)
    weights = [_loaded(whole, each, where) for each in together.models]
    test = task.data("test")
    chosen = torch.randperm(len(test), generator=torch_generator(seed, "barrier", "examples"))[:examples].sort().values
    if not len(chosen):
        raise DataError("there are no examples to measure the loss on")
    order = torch_generator(seed, "barrier", "align")

    def measured(given: Weights) -> dict[str, float]:
        return evaluate(task, network, Subset(test, chosen), given, batch_size=BATCH, precision="fp32", device=where)

    shown = input_batches(task.data("probe"), BATCH, order, device=where)
    first, second = weights
    lines = barrier(
        first, second, measured, model=network, data=shown, align=align, points=points, repair=repair, seed=seed
    )
    return lines, notes


def _loaded(network: Network, weights: Weights, device: torch.device) -> dict[str, Tensor]:
    types = {name: tensor.dtype for name, tensor in network.model.state_dict().items()}
    return {name: tensor.to(device, types[name]) for name, tensor in network.complete(weights).items()}


def _task(hook: str, data: str | None, seed: int) -> Task:
    """Return the hook's task, or one made of its model and labelled data."""
    made = hook_result(hook, "", "model hook")
    if isinstance(made, Task):
        if data is not None:
            raise ConfigError(f"model hook {hook!r} returns a Task, which has data of its own: leave --data out")
        return made
    found: Any = cast("tuple[Any, ...]", made)[0] if isinstance(made, tuple) and made else made
    if not isinstance(found, nn.Module):
        raise HookError(f"model hook {hook!r} must return a Task or a torch.nn.Module, not {type(found).__name__}")
    if data is None:
        raise ConfigError(
            f"model hook {hook!r} returns a model without data: give labelled examples with --data, or a hook that "
            "returns a Task"
        )
    network = found.float().eval()

    def build(generator: torch.Generator) -> nn.Module:
        del generator  # its weights do not matter
        return network

    examples = _labelled(data)
    with user_code(f"the model of {hook!r} failed on {data}"), torch.no_grad():
        few = examples.batch(torch.arange(min(2, len(examples))))
        outputs: Any = network(*few.inputs)
    classes, largest = getattr(outputs, "logits", outputs).shape[-1], int(examples.targets.max())
    if largest >= classes or int(examples.targets.min()) < 0:
        raise DataError(f"{data}: class {largest} has no output of the model, which has {classes}; classes begin at 0")
    order = torch.randperm(len(examples), generator=torch_generator(seed, "barrier", "probe"))
    return ClassificationTask("barrier", build, examples, examples, Subset(examples, order), ())


def _labelled(data: str) -> TensorData:
    """Return the examples of a safetensors file, or of a hook's batches; the last tensor of each has the classes."""
    path = Path(data)
    if path.suffix == ".safetensors" or path.exists():
        columns = read_data(path)
    else:
        made = hook_result(data, "", "data hook")
        with user_code(f"data hook {data!r} failed"):
            batches: list[tuple[Any, ...]] = [tuple(batch) for batch in made]
        if not all(isinstance(part, Tensor) and part.ndim for batch in batches for part in batch):
            raise HookError(f"data hook {data!r} must return batches of tensors, examples along the first axis")
        shapes = {tuple(part.shape[1:] for part in batch) for batch in batches}
        if len(shapes) > 1:
            raise HookError(f"data hook {data!r} returns batches of unequal shapes: {', '.join(map(str, shapes))}")
        if not batches or any(len(batch) != len(batches[0]) for batch in batches):
            raise HookError(
                f"data hook {data!r} must return batches of equally many tensors, the last with the classes"
            )
        columns = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    whole = columns and not columns[-1].is_floating_point() and not columns[-1].is_complex()
    if len(columns) < 2 or columns[-1].ndim != 1 or not whole or columns[-1].dtype == torch.bool:
        last = f"{[*columns[-1].shape]} of {str(columns[-1].dtype).removeprefix('torch.')}" if columns else "nothing"
        raise DataError(f"{data}: labelled examples are inputs and, last, one class number for each; last is {last}")
    inputs = [column.float() if column.is_floating_point() else column for column in columns[:-1]]
    return TensorData(inputs, columns[-1].long())
