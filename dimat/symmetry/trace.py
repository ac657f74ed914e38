"""Tracing: a module becomes a graph of aten operations with named placeholders.

It uses `torch.export.export(strict=False)` in eval mode, with a dynamic batch axis if the model allows it. The graph is
the training IR: in-place operations survive in it. All knowledge of torch.export's objects is in this file; the rest of
the package sees `Trace` and plain `torch.fx` nodes. Modules that export cannot follow: `paths.py`.
"""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from dimat.errors import SymmetryError, unknown_name
from dimat.symmetry import tree
from dimat.symmetry.batched import traceable_vmap
from dimat.symmetry.digest import Origin, aliases, digest_of
from dimat.symmetry.mute import muted
from dimat.symmetry.paths import record_paths, record_sizes

_MOST_TRIES = 4

_EXPORTING = threading.Lock()  # torch.export keeps its state in globals: one at a time in a process


class SymmetryWarning(UserWarning):
    """Part of a model, or all of it, is left unpermuted; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A traced module.

    `sources` maps placeholder names to the tensors that they stand for, in order. `constants` holds the values of
    placeholders of kind `constant` (lifted constants and non-persistent buffers), by placeholder name.
    `outputs` gives, for each flat output, its name and node (None if it is no tensor). `shapes` and
    `dtypes` are those of parameters and persistent buffers; `tied` are sets of names of one tensor, and
    `entangled` names whose memory overlaps another tensor's in part. `digest` is a hex blake3 of all that.
    A module that export cannot follow has `kind` "make_fx": it was run on some inputs, and `others` are the traces of
    the paths that it took besides the first.
    """

    module: fx.GraphModule
    sources: Mapping[str, Origin]
    constants: Mapping[str, torch.Tensor]
    outputs: tuple[tuple[str, fx.Node | None], ...]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    tied: tuple[tuple[str, ...], ...]
    entangled: frozenset[str]
    digest: str
    kind: Literal["export", "make_fx"] = "export"
    others: tuple[Trace, ...] = ()

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.module.graph.nodes)

    def canonical(self, name: str) -> str:
        """Return the first name of the tensor that `name` is tied to, or itself."""
        return next((names[0] for names in self.tied if name in names), name)

    def select_outputs(self, outputs: Sequence[int | str] | None) -> tuple[int, ...]:
        """Return the indices of the outputs that a selector names: flat indices, names, or name prefixes.

        Raises SymmetryError naming a selector without a match.
        """
        if outputs is None:
            return tuple(range(len(self.outputs)))
        names = [name for name, _ in self.outputs]
        chosen: set[int] = set()
        for wanted in outputs:
            if isinstance(wanted, int) and -len(names) <= wanted < len(names):
                chosen.add(wanted % len(names))
            elif hits := {i for i, name in enumerate(names) if f"{name}.".startswith(f"{wanted}.")}:
                chosen |= hits
            else:
                raise SymmetryError(unknown_name("output", str(wanted), names, "outputs="))
        return tuple(sorted(chosen))


def trace(model: nn.Module, example_inputs: Any) -> Trace:
    """Trace a module in eval mode; the mode of every submodule is restored.

    It uses `torch.export`, or, if that fails, runs the module on some inputs (`dimat.symmetry.paths`).

    `example_inputs` is a tensor, a tuple of arguments, or a mapping of keyword arguments. A batch axis of
    size 1 is doubled for tracing, since export would take the 1 for part of the architecture.
    Raises SymmetryError if the module cannot be traced; its message is the cause.
    """
    args, kwargs = tree.as_arguments(example_inputs)
    tensors = [leaf for leaf in tree.leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    tries: list[tuple[Any, bool, bool]] = [((args, kwargs), True, True), ((args, kwargs), False, True)]
    if tensors and all(t.ndim and t.shape[0] == 1 for t in tensors):
        tries.insert(0, (tree.map_tensors(_doubled, (args, kwargs)), True, True))
    causes: list[Exception] = []
    for (these_args, these_kwargs), dynamic, grad in tries:
        try:
            program = _export(model, these_args, these_kwargs, dynamic, grad)
        except Exception as error:  # export raises whatever the model's code does
            causes.append(error)
            if isinstance(error, NotImplementedError) and "backward" in str(error) and len(tries) < _MOST_TRIES:
                tries.append(((args, kwargs), True, False))  # as flex attention on a CPU
        else:
            traced = _read(model, program)
            _learn_sizes(model, traced, (these_args, these_kwargs))
            _RECENT[model] = (_look(model, example_inputs), traced)
            return traced
    try:
        traced = _run(model, args, kwargs)
    except Exception as error:  # so does running it
        causes.append(error)
    else:
        _RECENT[model] = (_look(model, example_inputs), traced)
        return traced
    exported, ran = (f"{type(error).__name__}: {first_line(error)}" for error in (causes[0], causes[-1]))
    both = ran if exported == ran else f"running it raised {ran}; torch.export raised {exported}"
    raise SymmetryError(both) from causes[-1]


_RECENT: WeakKeyDictionary[nn.Module, tuple[Any, Trace]] = WeakKeyDictionary()


def retrace(model: nn.Module, example_inputs: Any) -> Trace:
    """Return the latest trace of this module if neither it nor the inputs seem to have changed, else trace.

    It notices changes of printed structure, of tensor shapes and of input shapes, but not of a flag that alters
    `forward` and is not printed. Raises SymmetryError if the module cannot be traced.
    """
    known = _RECENT.get(model)
    if known is not None and known[0] == _look(model, example_inputs):
        return known[1]
    return trace(model, example_inputs)


def _look(model: nn.Module, example_inputs: Any) -> Any:
    given = tuple(
        (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else repr(leaf)
        for leaf in tree.leaves(tree.as_arguments(example_inputs))
    )
    return repr(model), tuple((name, tuple(p.shape), p.dtype) for name, p in model.named_parameters()), given


@contextmanager
def eval_mode(model: nn.Module) -> Generator[None]:
    """Put a module in eval mode, and every submodule back into its own mode afterwards.

    Values that modules cache in eval mode because they derive from their weights are dropped before and after, so that
    values from other weights are never used (see `forget_derived`).
    """
    with modes_kept(model):
        model.train()
        model.eval()
        yield


@contextmanager
def modes_kept(model: nn.Module) -> Generator[None]:
    """Put every submodule back into its own mode afterwards; cached values that derive from weights are dropped."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        _back_into(model, modes)


def forget_derived(model: nn.Module) -> None:
    """Make modules drop the values that they cache in eval mode because they derive from weights; modes stay.

    Examples are the biases of attention in LeViT and similar models, cached at the first forward pass in eval mode,
    even if the weights change later. By convention they are dropped when a module is put into training mode.
    """
    _back_into(model, [(module, module.training) for module in model.modules()])


def _back_into(model: nn.Module, modes: Sequence[tuple[nn.Module, bool]]) -> None:
    model.train()
    if not modes[0][1]:  # what is derived on the way into eval mode is derived from the weights as they are now
        model.eval()
    for module, training in modes:
        module.training = training


def shape_of(value: Any) -> tuple[int, ...] | None:
    """Return the sizes that a traced tensor had for the example inputs, or None if they are not known."""
    if not isinstance(value, torch.Tensor):
        return None
    sizes = [hint(size) for size in value.shape]
    return None if None in sizes else tuple(size for size in sizes if size is not None)


def hint(size: Any) -> int | None:
    """Return the example's value of a symbolic size, or None if it depends on data."""
    if isinstance(size, torch.SymInt):
        size = size.node.hint
    return int(size) if isinstance(size, (int, bool)) else None


def location_of(node: fx.Node) -> str:
    """Return `file:line` of the user's code behind a node; its module or its name if that was not recorded.

    Code that torch generated (the branches of `cond`, say) is no place that a user can look up.
    """
    place = ""
    for line in str(node.meta.get("stack_trace") or "").splitlines():
        file, _, rest = line.strip().removeprefix("File ").partition(", line ")
        if rest and "<eval_with_key>" not in file and ("/torch/nn/" not in file or not place):
            place = f"{file.strip(chr(34))}:{rest.partition(',')[0]}"
    if place:
        return place
    stack: Mapping[str, Any] = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]).partition("@")[0] for entry in stack.values()]
    return f"module '{paths[-1]}'" if paths and paths[-1] else f"node {node.name}"


def _doubled(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor])


def _export(model: nn.Module, args: Any, kwargs: Any, dynamic: bool, grad: bool) -> torch.export.ExportedProgram:
    shapes: Any = None
    if dynamic:
        shapes = torch.export.ShapesCollection()
        for leaf in tree.leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.ndim:
                shapes[leaf] = {0: torch.export.Dim.AUTO}
    with _EXPORTING, eval_mode(model), _quiet(), traceable_vmap(), torch.set_grad_enabled(grad):
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


@contextmanager
def _quiet() -> Generator[None]:
    """Suppress export's output beside the error that it raises: warnings about its own internals and about models'
    caches, a log line, and graphs printed on stdout, which is for a command's JSON."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = log.disabled
    with warnings.catch_warnings(), muted():
        warnings.simplefilter("ignore")
        log.disabled = True
        try:
            yield
        finally:
            log.disabled = before


def _read(model: nn.Module, program: torch.export.ExportedProgram) -> Trace:
    state = model.state_dict(keep_vars=True)
    signature = program.graph_signature
    sources: dict[str, Origin] = {}
    constants: dict[str, torch.Tensor] = {}
    for spec in signature.input_specs:
        placeholder = spec.arg.name
        kind = spec.kind.name
        name = spec.target or placeholder
        if kind in ("PARAMETER", "BUFFER") and name in state:
            sources[placeholder] = Origin("parameter" if kind == "PARAMETER" else "buffer", name)
        elif kind == "USER_INPUT":
            sources[placeholder] = Origin("input", name)
        else:
            sources[placeholder] = Origin("constant", name)
            value = program.constants.get(name)
            if isinstance(value, torch.Tensor):
                constants[placeholder] = value.detach()
    nodes = {node.name: node for node in program.graph.nodes}
    flat = [nodes.get(str(getattr(spec.arg, "name", ""))) for spec in signature.output_specs]
    users = [node for node, spec in zip(flat, signature.output_specs) if spec.kind.name == "USER_OUTPUT"]
    structure: Any = program.call_spec.out_spec
    shell = structure.unflatten(list(range(len(users))))
    outputs = tuple((name, users[index]) for name, index in tree.named_leaves(shell) if index is not None)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    tied, entangled = aliases(tensors)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    dtypes = {name: value.dtype for name, value in tensors.items()}
    digest = digest_of(program.graph_module, sources, constants, shapes, dtypes, tied)
    module = program.graph_module
    return Trace(module, sources, constants, outputs, shapes, dtypes, tied, entangled, digest)


def _learn_sizes(model: nn.Module, traced: Trace, given: Any) -> None:
    """If sizes in a graph depend on data, run it on the example, and give every node its sizes from that run.

    Nodes that cannot be run keep unknown sizes, and axes that meet these are frozen.
    """
    if all(_is_known(node.meta.get("val")) for node in traced.nodes):
        return
    state = model.state_dict(keep_vars=True)
    inputs = iter(tree.leaves(given))
    values: list[Any] = []
    for node in traced.nodes:
        if node.op != "placeholder":
            continue
        source = traced.sources[node.name]
        if source.kind == "input":
            values.append(next(inputs, None))
        else:
            values.append(traced.constants.get(node.name) if source.kind == "constant" else state[source.name])
    with suppress(Exception), muted(), torch.no_grad():  # operations raise what they like
        record_sizes(traced.module, values)


def _is_known(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_known, cast("Sequence[Any]", value)))
    if isinstance(value, torch.Tensor):
        return shape_of(value) is not None
    return not isinstance(value, torch.SymInt) or hint(value) is not None


def _run(model: nn.Module, args: Any, kwargs: Any) -> Trace:
    """Trace the paths that a module takes on some inputs."""
    with eval_mode(model), _quiet(), traceable_vmap():
        graphs, names, outputs = record_paths(model, args, kwargs)
    state = model.state_dict(keep_vars=True)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    others = dict(model.named_buffers())
    tied, entangled = aliases(tensors)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    dtypes = {name: value.dtype for name, value in tensors.items()}
    # not the graphs: which paths were taken depends on the numbers given, and peers have other ones
    digest = digest_of(None, {}, {}, shapes, dtypes, tied)
    traces: list[Trace] = []
    for graph in graphs:
        nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
        sources: dict[str, Origin] = {}
        constants: dict[str, torch.Tensor] = {}
        for number, node in enumerate(nodes):
            name = names[number] if number < len(names) else f"input {number - len(names)}"
            if name in tensors:
                sources[node.name] = Origin("parameter" if name in parameters else "buffer", name)
            elif number < len(names):
                sources[node.name] = Origin("constant", name)
                constants[node.name] = others[name].detach()
            else:
                sources[node.name] = Origin("input", name)
        made: list[Any] = list(next(node for node in graph.graph.nodes if node.op == "output").args[0])
        flat = tuple((name, None if place is None else made[place]) for name, place in outputs)
        traces.append(Trace(graph, sources, constants, flat, shapes, dtypes, tied, entangled, digest, kind="make_fx"))
    return replace(traces[0], others=tuple(traces[1:]))


def first_line(error: Exception) -> str:
    """Return an error's message in one line, without addresses in memory."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:300]
    return re.sub(r" at 0x[0-9a-f]+", "", line)
