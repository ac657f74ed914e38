"""Traces modules that export cannot follow because their control flow depends on values.

`make_fx` runs the module on real numbers and records the operations. Several runs on different numbers take different
paths, which all relate the axes of the same parameters. A path that no run took is not covered; therefore the numeric
check (`verify_symmetry`) must pass on inputs that were not traced. Only this module uses `torch.fx.experimental`; a
test covers the behaviour that it relies on.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from dimat.symmetry import tree

PATHS = 4
"""How many inputs a module is run on: the given one, and others of the same shapes."""


def record_paths(
    model: nn.Module, args: Any, kwargs: Any
) -> tuple[list[fx.GraphModule], list[str], list[tuple[str, int | None]]]:
    """Run a module several times and return the graphs, the names of parameters and buffers, and the outputs.

    The names are those of each graph's first placeholders, in order; the other placeholders are the input tensors. An
    output is its name and its position among the graph's outputs (None if it is not a tensor). Every node has its value
    as a meta tensor in `meta["val"]`. The module must be in eval mode. Raises the exceptions that the module's code
    raises.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = list(tensors)
    leaves = tree.leaves((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    with torch.no_grad():
        result = model(*tree.map_tensors(torch.clone, args), **tree.map_tensors(torch.clone, kwargs))
    named = tree.named_leaves(result)
    count = 0
    outputs: list[tuple[str, int | None]] = []
    for name, leaf in named:
        outputs.append((name, count if isinstance(leaf, Tensor) else None))
        count += isinstance(leaf, Tensor)

    def run(weights: list[Tensor], given: list[Tensor]) -> list[Tensor]:
        values = list(leaves)
        for place, tensor in zip(places, given):
            values[place] = tensor
        these, those = tree.rebuilt((args, kwargs), values)
        inner, own = unwrapped(model, dict(zip(names, weights)))
        made = torch.func.functional_call(inner, own, these, those)
        return [leaf for leaf in tree.leaves(made) if isinstance(leaf, Tensor)]

    graphs: list[fx.GraphModule] = []
    causes: list[Exception] = []
    codes: set[str] = set()
    generator = torch.Generator().manual_seed(0)
    for number in range(PATHS):
        given = [leaves[place].detach().clone() for place in places]
        if number:
            given = [_other(tensor, generator) for tensor in given]
        # in-place writes change copies only
        weights = [tensor.detach().clone() for tensor in tensors.values()]
        try:
            with torch.no_grad():
                graph = make_fx(run, tracing_mode="real", pre_dispatch=True, _error_on_data_dependent_ops=False)(
                    weights, given
                )
            if graph.code in codes:
                continue
            _Recorder(graph).run(*[tensor.detach().clone() for tensor in tensors.values()], *given)
        except Exception as error:  # numbers that the model refuses: other paths may still work
            causes.append(error)
        else:
            codes.add(graph.code)
            graphs.append(graph)
    if not graphs:
        raise causes[0]
    return graphs, names, outputs


def unwrapped(model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the module inside a `DataParallel`, and the weights under that module's names.

    torch cannot run the wrapper with other weights. Any other module is returned unchanged.
    """
    if not isinstance(model, nn.DataParallel):
        return model, dict(weights)
    return model.module, {name.removeprefix("module."): value for name, value in weights.items()}


def _other(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return other numbers of the same shape: floats are drawn anew, integers are put in another order.

    Integers change places within their row only, so each row keeps its values (one end-of-text token each, say); a
    sorted vector (lengths, offsets, graph numbers) stays as it is.
    """
    if tensor.is_floating_point() or tensor.is_complex():
        scale = tensor.detach().abs().float().mean().clamp_min(1e-3).cpu()
        kind = torch.complex64 if tensor.is_complex() else torch.float32
        return (torch.randn(tensor.shape, generator=generator, dtype=kind) * scale * 2).to(tensor)
    if tensor.ndim < 2:
        steps = tensor.long().diff()
        if bool((steps >= 0).all()) or bool((steps <= 0).all()):
            return tensor.detach().clone()
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.reshape(1, -1)
    orders = torch.stack([torch.randperm(rows.shape[1], generator=generator) for _ in range(rows.shape[0])])
    return rows.gather(1, orders.to(tensor.device)).view(tensor.shape)


def record_sizes(graph: fx.GraphModule, given: Sequence[Any]) -> None:
    """Run a traced graph on real values and record every node's value, so that data-dependent sizes are known.

    `given` holds a value for each placeholder and is not modified. Raises the exceptions of the graph's operations.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _Recorder(graph).run(*[value.detach().clone() if isinstance(value, Tensor) else value for value in given])


class _Recorder(fx.Interpreter):
    """Runs a graph and records every node's value as a meta tensor."""

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            value = super().run_node(n)
        n.meta["val"] = tree.map_tensors(_empty, value)
        return value


def _empty(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta")
