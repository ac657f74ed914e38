"""Observes activations: runs the traced graph and reads the units of each group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from dimat.errors import SymmetryError
from dimat.symmetry import tree
from dimat.symmetry.cache import forget
from dimat.symmetry.derive import fits
from dimat.symmetry.spec import ObservationPoint, SymmetrySpec
from dimat.symmetry.trace import Trace, retrace


class Observer:
    """Reads activations of one architecture under any weights, without a module to copy them into.

    The graph is traced once, here, in eval mode; `model`'s own weights are not kept. Raises SymmetryError
    if the model cannot be traced or the spec belongs to another architecture.
    """

    def __init__(self, model: nn.Module, spec: SymmetrySpec, example_inputs: Any) -> None:
        self._trace: Trace = retrace(model, example_inputs)
        if not fits(spec, self._trace):
            forget(spec)  # should it be one that was kept from an earlier start
            raise SymmetryError("the spec was derived from another model; call derive_symmetry for this one")
        self._spec = spec
        self._nodes = self._trace.nodes
        self._named = {node.name: node for node in self._nodes}
        self._aliases = {name: names for names in self._trace.tied for name in names}
        self._shielded: set[str] = set()

    def input_node(self, module: str) -> str:
        """Return the name of the node whose value enters the submodule of this path (its first argument).

        Observation points there are those whose `node` is this name; see `points_at`.
        Raises SymmetryError if no operation of the graph runs inside that submodule.
        """
        inside = [node for node in self._nodes if self._within(node, module)]
        for node in inside:
            for source in node.all_input_nodes:
                known = self._trace.sources.get(source.name)
                if source not in inside and (known is None or known.kind == "input"):
                    return source.name
        raise SymmetryError(f"nothing enters a submodule {module!r} in the traced graph")

    def run(
        self,
        weights: Mapping[str, Tensor],
        inputs: tuple[Any, ...] | Tensor | Mapping[str, Any],
        points: Mapping[str, Sequence[ObservationPoint]],
    ) -> dict[str, list[Tensor]]:
        """Return, for every group and each of its points, a matrix of shape (samples, units), float32.

        Samples are ordered by the node's other axes, row-major: batch first, then positions. Weights
        (state-dict names; tied names need only one) and inputs are not modified, whatever the graph does in
        place. The batch may be of any size if the model allows it. Runs on the device of weights and inputs.
        Raises SymmetryError for a point or a tensor that is not there.
        """
        wanted: dict[str, list[tuple[str, int, ObservationPoint]]] = {}
        for group, listed in points.items():
            for number, point in enumerate(listed):
                if point.node not in self._named:
                    raise SymmetryError(f"no node {point.node!r} in the traced graph (point of group {group!r})")
                wanted.setdefault(point.node, []).append((group, number, point))
        result: dict[str, list[Tensor]] = {group: [torch.empty(0)] * len(p) for group, p in points.items()}
        if not wanted:
            return result
        given = tree.leaves(tree.as_arguments(inputs))
        while True:
            try:
                with torch.no_grad():
                    self._run(weights, given, wanted, result)
            except _Touched as touched:
                # found out before anything was changed: start again with copies of these tensors
                self._shielded.update(touched.placeholders)
            else:
                return result

    def _run(
        self,
        weights: Mapping[str, Tensor],
        given: Sequence[Any],
        wanted: Mapping[str, Sequence[tuple[str, int, ObservationPoint]]],
        result: Mapping[str, list[Tensor]],
    ) -> None:
        last = max(number for number, node in enumerate(self._nodes) if node.name in wanted)
        nodes = self._nodes[: last + 1]
        final_use = {source: node for node in nodes for source in node.all_input_nodes}
        device = next((leaf.device for leaf in given if isinstance(leaf, Tensor)), torch.device("cpu"))
        values: dict[fx.Node, Any] = {}
        inputs = iter(given)
        owners: dict[int, list[str]] = {}
        for node in nodes:
            if node.op == "placeholder":
                values[node] = self._placeholder(node, node in final_use, weights, inputs, device, owners)
            elif node.op == "get_attr":
                part = getattr(self._trace.module, str(node.target))
                values[node] = part.to(device) if isinstance(part, Tensor) else part
            else:
                values[node] = self._call(node, values, owners, device)
            for group, number, point in wanted.get(node.name, ()):
                result[group][number] = matrix_of(values[node], point)
            for source in node.all_input_nodes:
                if final_use.get(source) is node:
                    del values[source]
            if node not in final_use:
                del values[node]

    def _placeholder(
        self,
        node: fx.Node,
        needed: bool,
        weights: Mapping[str, Tensor],
        inputs: Any,
        device: torch.device,
        owners: dict[int, list[str]],
    ) -> Any:
        source = self._trace.sources.get(node.name)
        if source is None or source.kind == "input":
            try:
                value = next(inputs)
            except StopIteration:
                raise SymmetryError(f"no input given for {source.name if source else node.name!r}") from None
        elif source.kind == "constant":
            value = self._trace.constants.get(node.name)
            value = value if value is None else value.to(device)
        else:
            names = self._aliases.get(source.name, (source.name,))
            value = next((weights[name] for name in names if name in weights), None)
            if value is None and needed:
                raise SymmetryError(f"tensor {source.name!r} is missing from the weights")
        if not isinstance(value, Tensor):
            return value
        if node.name in self._shielded:
            return value.detach().clone()
        owners.setdefault(value.untyped_storage().data_ptr(), []).append(node.name)
        return value.detach()

    def _call(
        self, node: fx.Node, values: Mapping[fx.Node, Any], owners: Mapping[int, list[str]], device: torch.device
    ) -> Any:
        for source in _written(node):
            value = values.get(source)
            if isinstance(value, Tensor):
                touched = owners.get(value.untyped_storage().data_ptr())
                if touched and value.numel():
                    raise _Touched(touched)
        if "_assert_tensor_metadata" in str(node.target):
            return None  # the trace's device and dtype need not be those of this run
        args = [device if isinstance(arg, torch.device) else arg for arg in map_arg(node.args, lambda n: values[n])]
        kwargs: dict[str, Any] = dict(map_arg(node.kwargs, lambda n: values[n]))
        if kwargs.get("device") is not None:
            kwargs["device"] = device
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except RuntimeError as error:
            raise SymmetryError(f"cannot observe: node {node.name} ({node.target}) failed: {error}") from error

    def _within(self, node: fx.Node, module: str) -> bool:
        stack: Mapping[str, Any] = node.meta.get("nn_module_stack") or {}
        paths = [str(entry[0]).partition("@")[0] for entry in stack.values()]
        return module in paths and node.op == "call_function"


def points_at(spec: SymmetrySpec, nodes: Iterable[str]) -> dict[str, list[ObservationPoint]]:
    """Return the spec's observation points at these graph nodes, by group."""
    names = set(nodes)
    found = {group.id: [point for point in group.points if point.node in names] for group in spec.groups}
    return {group: points for group, points in found.items() if points}


def matrix_of(value: Any, point: ObservationPoint) -> Tensor:
    """Return the units that a point shows in a node's output, as a new float32 matrix (samples, units).

    Of a group with parents: (samples, parents' units… · units), row-major.
    """
    if isinstance(value, (tuple, list)):
        value = value[0]
    run = value.narrow(point.dim, point.start, point.length)
    run = run.unflatten(point.dim, point.factors) if len(point.factors) > 1 else run
    units = [point.dim + position for position in (*point.outer, point.position)]
    moved = run.movedim(units, list(range(-len(units), 0)))
    copied = torch.empty(moved.shape, dtype=torch.float32, device=value.device).copy_(moved)
    return copied.view(-1, prod(moved.shape[-len(units) :]))


class _Touched(Exception):
    """An operation is about to write to a tensor that belongs to the caller."""

    def __init__(self, placeholders: list[str]) -> None:
        super().__init__(*placeholders)
        self.placeholders = placeholders


def _written(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose tensors an operation writes to."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return []
    written: list[fx.Node] = []
    for position, argument in enumerate(schema.arguments):
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        in_place = argument.alias_info is not None and argument.alias_info.is_write
        # batch statistics are updated without the schema saying so
        if in_place or argument.name in ("running_mean", "running_var"):
            written.extend(
                n for n in ([value] if not isinstance(value, (list, tuple)) else value) if isinstance(n, fx.Node)
            )
    return written
