"""Abstract interpretation: run a traced graph over layouts instead of numbers.

Every node gets an abstract value, and the rules relate the axes of parameters through the domain. If an operation has
no rule, or its rule declines, all axes of its tensor inputs and outputs are frozen.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from dimat.symmetry.atoms import Frozen, Layout, LayoutError
from dimat.symmetry.forms import Form, form_of, made
from dimat.symmetry.layout import Domain
from dimat.symmetry.rules import Call, NoRule, Value, create, find_rule, random
from dimat.symmetry.rules.call import Abstract, op_name
from dimat.symmetry.trace import Trace, first_line, shape_of

_LARGEST_CONSTANT = 1 << 26
"""Constants with more entries than this are frozen without reading their values."""

DEPENDS = "shape depends on data"
"""The reason for freezing an operation that has a tensor of unknown size among its inputs or outputs."""

_MOST_RESTARTS = 4

_TRANSPARENT = ("wrap_with_set_grad_enabled", "wrap_with_autocast", "wrap_with_disable_saved_tensors_hooks")
"""Higher-order operations that only run a sub-graph; the sub-graph is interpreted in their place."""


@dataclass(slots=True)
class Analysis:
    """The layouts in a graph: those of parameters and buffers by canonical name, and those of nodes.

    `unknown` maps nodes without a rule to (operation, reason). `used` holds the names of tensors that some node uses,
    `from_input` the nodes of the top graph whose value depends on a model input. `forms` gives, by (name, axis), the
    pieces into which axes of parameters were split from the start.
    """

    domain: Domain = field(default_factory=Domain)
    tensors: dict[str, Value] = field(default_factory=dict)
    values: dict[fx.Node, Abstract] = field(default_factory=dict)
    unknown: dict[fx.Node, tuple[str, str]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    forms: dict[tuple[str, int], Form] = field(default_factory=dict)
    from_input: set[fx.Node] = field(default_factory=set)

    def all_values(self) -> list[Value]:
        """Return all tensors and all node values."""
        values: list[Abstract] = [*self.tensors.values()]
        for value in self.values.values():
            values.extend(value if isinstance(value, list) else [value])
        return [value for value in values if isinstance(value, Value)]


def interpret(trace: Trace, outputs: tuple[int, ...]) -> Analysis:
    """Derive the layouts of a traced module; the outputs with the given indices must not change.

    If one axis turns out to contain several (query, key and value in one projection), it is split and the graph is
    interpreted again.
    """
    analysis = _once(trace, outputs, {})
    for _ in range(_MOST_RESTARTS):
        forms = {
            place: form
            for (name, value) in analysis.tensors.items()
            for place, layout in (((name, dim), layout) for dim, layout in enumerate(value.dims))
            if place not in analysis.forms and (form := form_of(analysis.domain, layout))
        }
        if not forms:
            break
        analysis = _once(trace, outputs, {**analysis.forms, **forms})
    return analysis


def _once(trace: Trace, outputs: tuple[int, ...], forms: dict[tuple[str, int], Form]) -> Analysis:
    analysis = Analysis(forms=forms)
    for path in (trace, *trace.others):
        for node in path.nodes:
            if node.op == "placeholder":
                analysis.values[node] = _placeholder(analysis, path, node)
            elif node.op == "output":
                _freeze_outputs(analysis, path, outputs)
            else:
                _visit(analysis, path.module, node)
                if not _is_blank(node) and any(source in analysis.from_input for source in node.all_input_nodes):
                    analysis.from_input.add(node)
    # resolving may still freeze layouts that cannot be expressed, which may affect other layouts
    for _ in range(2):
        for layout in [layout for value in analysis.all_values() for layout in value.dims]:
            analysis.domain.resolve(layout)
    analysis.domain.pair_lookups()
    return analysis


def _is_blank(node: fx.Node) -> bool:
    """Tell whether a node's result depends on its inputs by its size alone: zeros, random numbers."""
    function = find_rule(node.target)
    return function is create.constant or function is random.draw


def _placeholder(analysis: Analysis, trace: Trace, node: fx.Node) -> Abstract:
    source = trace.sources.get(node.name)
    shape = shape_of(node.meta.get("val"))
    if source is None or shape is None:
        return None
    if source.kind == "input":
        analysis.from_input.add(node)
        return _fixed(analysis.domain, shape, Frozen(f"model input '{source.name}'", node.name))
    if source.kind == "constant":
        return _constant(analysis.domain, trace.constants.get(node.name), shape, node.name)
    if node.users:
        analysis.used.add(trace.canonical(source.name))
    name = trace.canonical(source.name)
    if name not in analysis.tensors:
        analysis.tensors[name] = _parameter(analysis, trace, name, node.name)
    return analysis.tensors[name]


def _parameter(analysis: Analysis, trace: Trace, name: str, node: str) -> Value:
    shape, dtype, domain = trace.shapes[name], trace.dtypes[name], analysis.domain
    if not (dtype.is_floating_point or dtype.is_complex):
        return _fixed(domain, shape, Frozen("integer tensor", node))
    if name in trace.entangled:
        return _fixed(domain, shape, Frozen("shares memory with another tensor in part", node))
    forms = (analysis.forms.get((name, dim)) for dim in range(len(shape)))
    return Value(tuple(made(domain, form) if form else domain.fresh(size) for form, size in zip(forms, shape)))


def _fixed(domain: Domain, shape: tuple[int, ...], why: Frozen) -> Value:
    return Value(tuple(domain.fixed(size, why) for size in shape))


def _constant(domain: Domain, value: torch.Tensor | None, shape: tuple[int, ...], node: str) -> Value:
    """Return a constant's value: axes along which it does not change are free, the others are fixed."""
    why = Frozen("constant", node)
    if value is None or tuple(value.shape) != shape or value.numel() > _LARGEST_CONSTANT or value.is_meta:
        return _fixed(domain, shape, why)
    dims = [
        domain.fresh(size) if bool((value == value.narrow(d, 0, min(size, 1))).all()) else domain.fixed(size, why)
        for d, size in enumerate(shape)
    ]
    return Value(tuple(dims))


def _freeze_outputs(analysis: Analysis, trace: Trace, outputs: tuple[int, ...]) -> None:
    for index in outputs:
        name, node = trace.outputs[index]
        value = analysis.values.get(node) if node is not None else None
        for layout in value.dims if isinstance(value, Value) else ():
            analysis.domain.freeze(layout, Frozen(f"model output '{name}'", node.name if node else ""))


def _visit(analysis: Analysis, module: fx.GraphModule, node: fx.Node) -> None:
    if node.op == "get_attr":
        analysis.values[node] = _attribute(analysis, module, node)
    elif node.target is operator.getitem:
        analysis.values[node] = _item(analysis, node)
    elif str(node.target) in _TRANSPARENT and _inline(analysis, module, node):
        pass
    elif str(node.target) == "cond" and _branches(analysis, module, node):
        pass
    elif _called(node.target) in ("_add_batch_dim", "_remove_batch_dim"):
        if not _mapped(analysis, node):
            _freeze_all(analysis, node, f"no rule for {_called(node.target)}")
        return
    elif op_name(node.target):
        _apply_rule(analysis, node)
    elif any(isinstance(analysis.values.get(source), (Value, list)) for source in node.all_input_nodes):
        _freeze_all(analysis, node, f"no rule for {_called(node.target)}")
    else:
        analysis.values[node] = None
    _set_aside(analysis, node)


def _called(target: Any) -> str:
    """Return the name of a function without its memory address."""
    return str(getattr(target, "__name__", None) or re.sub(r" at 0x[0-9a-f]+", "", str(target)))


def _apply_rule(analysis: Analysis, node: fx.Node) -> None:
    function = find_rule(node.target)
    name = op_name(node.target)
    if function is None:
        _freeze_all(analysis, node, f"no rule for {name}")
        return
    if any(_is_lost(analysis, source) for source in node.all_input_nodes):
        _freeze_all(analysis, node, DEPENDS)
        return
    try:
        result = function(Call(node, analysis.domain, analysis.values))
        _check_shape(node, result)
        _settle_cases(analysis.domain, result)
    except (NoRule, LayoutError) as error:
        _freeze_all(analysis, node, f"no rule for {name}: {error}")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        # the rule does not cover this form of the call, e.g. an argument has no abstract value
        _freeze_all(analysis, node, f"no rule for this call of {name} ({type(error).__name__}: {first_line(error)})")
    else:
        analysis.values[node] = result


def _is_lost(analysis: Analysis, source: fx.Node) -> bool:
    """Tell whether a node makes a tensor that has no abstract value."""
    return analysis.values.get(source) is None and isinstance(source.meta.get("val"), torch.Tensor)


def _check_shape(node: fx.Node, result: Abstract) -> None:
    """Raise LayoutError if a rule's result does not have the shape that the operation returned."""
    expected: Any = node.meta.get("val")
    pairs = zip(result, expected) if isinstance(result, list) else [(result, expected)]
    for value, tensor in pairs:
        shape = shape_of(tensor)
        if value is not None and value.shape != shape:
            raise LayoutError(f"the rule gave shape {value.shape}, the operation {shape}")
        if value is None and shape is not None:
            raise LayoutError("the rule gave no tensor, the operation did")


def _settle_cases(domain: Domain, result: Abstract) -> None:
    """Settle the cases of a result that no longer has the axis of their choice."""
    if not domain.has_cases:
        return
    for value in result if isinstance(result, list) else [result]:
        if value is not None:
            choices = [domain.choice_of(layout) for layout in value.all_dims]
            for case in [case for layout in value.dims for case in domain.cases_of(layout)]:
                if case.choice not in choices:
                    domain.settle(case)


def _freeze_all(analysis: Analysis, node: fx.Node, reason: str) -> None:
    """Freeze all input and output tensors of a node, and record it as an unknown operation."""
    why = Frozen(reason, node.name)
    analysis.unknown[node] = (op_name(node.target) or _called(node.target), reason)
    for source in node.all_input_nodes:
        value = analysis.values.get(source)
        for tensor in value if isinstance(value, list) else [value]:
            for layout in tensor.all_dims if tensor is not None else ():
                analysis.domain.freeze(layout, why)

    def fixed(value: Any) -> Value | None:
        shape = shape_of(value)
        return None if shape is None else _fixed(analysis.domain, shape, why)

    made = node.meta.get("val")
    analysis.values[node] = [fixed(v) for v in made] if isinstance(made, (list, tuple)) else fixed(made)


def _attribute(analysis: Analysis, module: fx.GraphModule, node: fx.Node) -> Abstract:
    value = getattr(module, str(node.target), None)
    if not isinstance(value, torch.Tensor):
        return None
    return _constant(analysis.domain, value.detach(), tuple(value.shape), node.name)


def _item(analysis: Analysis, node: fx.Node) -> Abstract:
    source, position = node.args
    value = analysis.values.get(source) if isinstance(source, fx.Node) else None
    return value[position] if isinstance(value, list) and isinstance(position, int) else None


def _inline(analysis: Analysis, module: fx.GraphModule, node: fx.Node) -> bool:
    """Interpret the sub-graph that a node runs; return False if the node does not have the expected form."""
    position = next((i for i, arg in enumerate(node.args) if _graph_of(module, arg) is not None), None)
    inner = None if position is None else _graph_of(module, node.args[position])
    if position is None or inner is None:
        return False
    return _run_graph(analysis, inner, node.args[position + 1 :], node)


def _branches(analysis: Analysis, module: fx.GraphModule, node: fx.Node) -> bool:
    """Interpret both sub-graphs of a `cond`, whose results are permuted alike."""
    graphs = [_graph_of(module, arg) for arg in node.args[1:3]]
    given: Any = node.args[3]
    made: list[Abstract] = []
    for graph in graphs:
        if graph is None or not _run_graph(analysis, graph, given, node):
            return False
        made.append(analysis.values[node])
    one, other = (value if isinstance(value, list) else [value] for value in made)
    for first, second in zip(one, other):
        for layout, alike in zip(first.dims if first else (), second.dims if second else ()):
            analysis.domain.unify(layout, alike)
    return True


def _run_graph(analysis: Analysis, inner: fx.GraphModule, given: Sequence[Any], node: fx.Node) -> bool:
    """Interpret a graph on the values of some nodes and record its result as a node's value."""
    placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
    if len(given) != len(placeholders):
        return False
    for placeholder, arg in zip(placeholders, given):
        analysis.values[placeholder] = analysis.values.get(arg) if isinstance(arg, fx.Node) else None
    for sub in inner.graph.nodes:
        if sub.op == "output":
            made = sub.args[0]
            sequence = list(made) if isinstance(made, (tuple, list)) else [made]
            found = [analysis.values.get(n) if isinstance(n, fx.Node) else None for n in sequence]
            tensors = [value if isinstance(value, Value) else None for value in found]
            analysis.values[node] = tensors if isinstance(made, (tuple, list)) else tensors[0]
        elif sub.op != "placeholder":
            _visit(analysis, inner, sub)
    return True


def _mapped(analysis: Analysis, node: fx.Node) -> bool:
    """Interpret the entry to and the exit from `torch.func.vmap`: an axis is set aside, then restored."""
    source = analysis.values.get(node.all_input_nodes[0]) if node.all_input_nodes else None
    if not isinstance(source, Value):
        return False
    if _called(node.target) == "_add_batch_dim":
        axis, level = node.args[1:3]
        if not isinstance(axis, int) or not isinstance(level, int):
            return False
        axis %= source.ndim
        others = (*source.dims[:axis], *source.dims[axis + 1 :])
        analysis.values[node] = Value(others, (*source.mapped, (level, source.dims[axis])))
        return True
    shape, level, out = shape_of(node.meta.get("val")), node.args[1], node.args[3]
    if shape is None or not isinstance(out, int) or not isinstance(level, int):
        return False
    out %= len(shape)
    # a value that is the same for all indices is copied along a new axis
    axis = dict(source.mapped).get(level) or analysis.domain.fresh(shape[out])
    others = tuple(entry for entry in source.mapped if entry[0] != level)
    made = Value((*source.dims[:out], axis, *source.dims[out:]), others)
    analysis.values[node] = made
    return made.shape == shape


def _set_aside(analysis: Analysis, node: fx.Node) -> None:
    """Add the inputs' set-aside axes to an operation's result; axes of the same level are permuted alike."""
    axes: dict[int, Layout] = {}
    for source in node.all_input_nodes:
        given = analysis.values.get(source)
        for value in given if isinstance(given, list) else [given]:
            for level, layout in value.mapped if value is not None else ():
                analysis.domain.unify(axes.setdefault(level, layout), layout)
    if axes:
        made, mapped = analysis.values.get(node), tuple(axes.items())
        if isinstance(made, list):
            analysis.values[node] = [value and replace(value, mapped=mapped) for value in made]
        elif made is not None:
            analysis.values[node] = replace(made, mapped=mapped)


def _graph_of(module: fx.GraphModule, arg: Any) -> fx.GraphModule | None:
    if not isinstance(arg, fx.Node) or arg.op != "get_attr":
        return None
    part = getattr(module, str(arg.target), None)
    return part if isinstance(part, fx.GraphModule) else None
