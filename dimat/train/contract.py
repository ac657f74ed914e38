"""A task's contract, checked at every batch: data, losses, metrics, weights of parts.

A user's code may return anything. This module checks the result, so that one line says what is wrong and how to correct
it, instead of another library's traceback or a number that is silently wrong. `dimat.train.check_task` uses the same
functions before hours are spent.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten  # pyright: ignore[reportPrivateImportUsage]

from dimat.errors import HookError, TrainingError
from dimat.hooks import cause, user_code
from dimat.tasks.base import Batch, Task

TOLERANCE = 0.003
HALF_TOLERANCE = 0.03
"""Relative differences of gradients that count as rounding, for outputs in full and in half precision."""


@contextmanager
def task_errors(task: Task, doing: str = "") -> Generator[None]:
    """Turn errors of the task's code inside into HookError, with the step that it was `doing`.

    dimat's own errors pass unchanged, and a device out of memory is a TrainingError.
    """
    what = f"task {task.name} failed{f' in {doing}' if doing else ''}"
    try:
        with user_code(what, "mend its code"):
            yield
    except HookError as error:
        if isinstance(error.__cause__, torch.OutOfMemoryError):
            advice = "lower train.batch_size, or raise train.accumulate"
            raise TrainingError(f"{what}: {cause(error.__cause__)}; {advice}") from error.__cause__
        raise


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that is not empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "it says nothing").rstrip(".")


def described(value: Any) -> str:
    """Return a value's kind in a few words: shape and type of a tensor, or the class and its contents."""
    if isinstance(value, Tensor):
        place = " on the meta device" if value.is_meta else ""
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}{place}"
    if isinstance(value, tuple | list):
        entries = cast("tuple[Any, ...]", value)
        inside = ", ".join(map(described, entries[:3])) + (", …" if len(entries) > 3 else "")
        return f"a {type(entries).__name__} of {len(entries)} ({inside})"
    return f"a {type(value).__name__}"


def check_names(task: Task) -> None:
    """Raise HookError where a task's name, metric or classes are no texts, or two classes have one name."""
    for member in ("name", "metric"):
        value: Any = getattr(task, member)
        if not isinstance(value, str) or not value:
            raise HookError(f"a task's {member} is {described(value)}; give it as text")
    classes: Any = task.classes
    if isinstance(classes, str | Mapping) or not hasattr(classes, "__len__") or not hasattr(classes, "__iter__"):
        raise HookError(
            f"task {task.name}: its classes are {described(classes)}; give a tuple of their names in the order of the "
            "labels, () where there are no classes"
        )
    names = [str(name) for name in classes]
    if twice := [name for name in names if names.count(name) > 1]:
        raise HookError(f"task {task.name}: two of its classes are called {twice[0]!r}; give each a name of its own")


def checked_batch(task: Task, batch: Any, count: int, what: str) -> Batch:
    """Return the result of `data.batch` for `count` indices; HookError if it is not a `Batch` of that many examples."""
    if not isinstance(batch, tuple) or len(cast("tuple[Any, ...]", batch)) != 2:
        raise HookError(f"task {task.name}: {what} returned {described(batch)}; return Batch(inputs, targets)")
    inputs, targets = cast("tuple[Any, Any]", batch)
    if not isinstance(inputs, tuple | list) or not all(isinstance(t, Tensor) for t in cast("list[Any]", inputs)):
        mend = "inputs are a tuple of tensors, the model's positional arguments"
        raise HookError(f"task {task.name}: {what} returned inputs that are {described(inputs)}; {mend}")
    if not isinstance(targets, Tensor):
        raise HookError(f"task {task.name}: {what} returned targets that are {described(targets)}; give a tensor")
    found = Batch(tuple(cast("list[Tensor]", inputs)), targets)
    for name, tensor in [*((f"inputs[{i}]", t) for i, t in enumerate(found.inputs)), ("targets", targets)]:
        if tensor.ndim == 0 or len(tensor) != count:
            raise HookError(
                f"task {task.name}: {what} returned {name} of shape {tuple(tensor.shape)} for {count} indices; "
                "examples lie along dim 0, one for each index"
            )
    return found


def checked_loss(task: Task, loss: Any, member: str = "loss()", *, trained: bool = False) -> Tensor:
    """Return a loss as a scalar; HookError if it is not one, or if it is to be `trained` on and has no gradient."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex() or loss.is_meta:
        advice = "" if not isinstance(loss, Tensor) or loss.ndim == 0 else ", e.g. by .mean()"
        raise HookError(
            f"task {task.name}: {member} returned {described(loss)}; return the mean loss of the batch as a scalar "
            f"tensor{advice}"
        )
    if trained and not loss.requires_grad:
        raise HookError(
            f"task {task.name}: {member} returned a loss without a gradient; compute it from the model's outputs, "
            "without detach(), no_grad or argmax, and leave parameters that require gradients"
        )
    return loss.reshape(())


def checked_metrics(task: Task, metrics: Any, count: int) -> dict[str, Tensor]:
    """Return a batch's metrics, (count,) each; HookError for one that is not one real number per example."""
    if not isinstance(metrics, Mapping):
        raise HookError(f"task {task.name}: metrics() returned {described(metrics)}; return tensors by name")
    found: dict[str, Tensor] = {}
    for name, value in cast("Mapping[str, Any]", metrics).items():
        # (count, 1) is one number an example too
        if (
            not isinstance(value, Tensor)
            or value.is_complex()
            or value.is_meta
            or value.shape not in ((count,), (count, 1))
        ):
            raise HookError(
                f"task {task.name}: metrics()[{name!r}] is {described(value)} for a batch of {count}; return one "
                f"number an example, shape ({count},), without .mean(): dimat takes the mean over the whole set"
            )
        found[name] = value.reshape(count)
    return found


def loss_weight(task: Task, targets: Tensor) -> float:
    """Return the weight of a batch's loss beside others': the task's value, else the number of examples."""
    weigh: Any = getattr(task, "loss_weight", None)
    if weigh is None:
        return float(len(targets))
    with task_errors(task, "loss_weight()"):
        weight = float(weigh(targets))
    if not 0 <= weight < float("inf"):
        raise HookError(f"task {task.name}: loss_weight() returned {weight}; return a number that is 0 or more")
    return weight


def check_parts(task: Task, parts: list[tuple[Any, Tensor]]) -> None:
    """Raise HookError unless the weighted loss of a batch's parts has the same gradients as the whole batch.

    `parts`: the model's outputs and the targets of each. It compares gradients with respect to outputs, not losses:
    while a network is untrained, all losses are about the same.
    """
    weights = [loss_weight(task, targets) for _, targets in parts]
    counted = [(*part, weight / sum(weights)) for part, weight in zip(parts, weights, strict=True) if weight]
    flat = [tree_flatten(outputs) for outputs, _, _ in counted]
    columns = list(zip(*(leaves for leaves, _ in flat), strict=True))
    along = [place for place, column in enumerate(columns) if _along(column, [t for _, t, _ in counted])]
    if len(counted) < 2 or not along:
        return
    single = [
        [grad * share for grad in _gradients(task, leaves, form, along, targets)]
        for (leaves, form), (_, targets, share) in zip(flat, counted, strict=True)
    ]
    joined = [
        torch.cat([leaf.detach() for leaf in column]) if place in along else column[0]
        for place, column in enumerate(columns)
    ]
    whole = _gradients(task, joined, flat[0][1], along, torch.cat([targets for _, targets, _ in counted]))
    expected = [torch.cat(column) for column in zip(*single, strict=True)]
    half = any(grad.dtype.itemsize < 4 for grad in whole)
    if not alike(whole, expected, HALF_TOLERANCE if half else TOLERANCE):
        raise HookError(unlike_parts(task))


def alike(some: Sequence[Tensor], others: Sequence[Tensor], tolerance: float) -> bool:
    """Tell whether gradients are the same except for rounding: up to a relative difference."""
    apart = sum(float((a - b).double().square().sum()) for a, b in zip(some, others, strict=True))
    return apart <= tolerance**2 * sum(float(a.double().square().sum()) for a in some) + 1e-30


def unlike_parts(task: Task) -> str:
    """Compose the message for a loss that is not the mean of the losses of its parts."""
    return (
        f"task {task.name}: the loss of a batch is not the mean of its parts', as where labels are ignored, so that "
        "train.accumulate would change what is trained; give the task loss_weight(targets), the number of labels that "
        "count, or set train.accumulate = 1"
    )


def _along(column: Sequence[Any], targets: Sequence[Tensor]) -> bool:
    """Tell whether an output is a floating tensor with an entry for each example, in every part."""
    return all(
        isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape[:1] == (len(each),)
        for leaf, each in zip(column, targets, strict=True)
    )


def _gradients(task: Task, leaves: Sequence[Any], form: Any, along: Sequence[int], targets: Tensor) -> list[Tensor]:
    """Return the gradients of the loss with respect to the outputs at the positions `along`."""
    own = [leaf.detach().requires_grad_() if place in along else leaf for place, leaf in enumerate(leaves)]
    asked = [own[place] for place in along]
    with torch.enable_grad(), task_errors(task, "loss()"):
        loss = checked_loss(task, task.loss(tree_unflatten(own, form), targets), trained=True)
        return list(torch.autograd.grad(loss, asked, allow_unused=True, materialize_grads=True))
