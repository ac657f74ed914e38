"""Traces modules that export cannot follow because control flow depends on values.

`make_fx` runs the module on real numbers and records the operations that were run. Several runs on different numbers
take different paths; all of them relate the axes of the same parameters. A path that none of them took is not covered,
which is why the numeric check (`verify_symmetry`) must pass on inputs that were not traced. This is the package's only
use of `torch.fx.experimental`; a test pins what it relies on.
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
"""How many inputs a module is run on: those given, and as many more of the same shapes."""


def record_paths(
    model: nn.Module, args: Any, kwargs: Any
) -> tuple[list[fx.GraphModule], list[str], list[tuple[str, int | None]]]:
    """Return the graphs of some runs, the names of their first placeholders (parameters and buffers), and outputs.

    An output is its name and its place among the graph's outputs (None where it is no tensor). The other placeholders
    are the tensors among the inputs. Every node has its value, without memory, as `meta["val"]`. The module must be
    in eval mode. Raises whatever the module's code raises.
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
        # in place writes reach copies only
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
    """Return what a `DataParallel` runs, and its weights by the names there; torch cannot run the wrapper with others.

    Anything else is returned as it is.
    """
    if not isinstance(model, nn.DataParallel):
        return model, dict(weights)
    return model.module, {name.removeprefix("module."): value for name, value in weights.items()}


def _other(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return other numbers of the same shape: drawn anew, or the same integers in another order.

    Integers change places within their row only, so that each row keeps what it holds (as one end-of-text token each);
    a sorted vector (lengths, offsets, numbers of graphs) stays sorted.
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
    """Run a traced graph on real values and note every node's value, so that sizes that depend on data are known.

    `given` holds a value for each placeholder; none is modified. Raises whatever the graph's operations raise.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _Recorder(graph).run(*[value.detach().clone() if isinstance(value, Tensor) else value for value in given])


class _Recorder(fx.Interpreter):
    """Runs a graph and notes every node's value, without its memory."""

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            value = super().run_node(n)
        n.meta["val"] = tree.map_tensors(_empty, value)
        return value


def _empty(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta")
