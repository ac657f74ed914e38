"""A transfer rule's argument (`Call`), its result (`Value`), and the table of rules.

A rule is a function of one `Call`. It relates axes through `call.domain` and returns the value of the operation's
output: a `Value`, a list of them (None for other outputs) if it has several outputs, or None if it has none. If it
cannot determine what the operation does with its axes, it raises `NoRule`, and the operation is treated as unknown: all
axes of its inputs and outputs are frozen.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from dimat.errors import SymmetryError
from dimat.symmetry.atoms import Frozen, Layout, layout_size
from dimat.symmetry.layout import Domain, Lookup
from dimat.symmetry.trace import hint, shape_of


class NoRule(Exception):
    """Raised by a rule for a call that it does not cover; the message is the reason to freeze."""


@dataclass(frozen=True, slots=True)
class Value:
    """An abstract tensor: one layout for each of its axes.

    `mapped`: axes that `torch.func.vmap` has set aside, by its level; every operation is done for each of their indices
    alone.
    """

    dims: tuple[Layout, ...]
    mapped: tuple[tuple[int, Layout], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(layout_size(layout) for layout in self.dims)

    @property
    def ndim(self) -> int:
        return len(self.dims)

    @property
    def all_dims(self) -> tuple[Layout, ...]:
        """All axes, those set aside behind the others."""
        return (*self.dims, *(layout for _, layout in self.mapped))


Result = Value | list[Value | None] | None
Abstract = Value | list[Value | None] | None


class Call:
    """One operation of the graph: its arguments by schema name, its values, its output shapes."""

    def __init__(self, node: fx.Node, domain: Domain, values: Mapping[fx.Node, Abstract]) -> None:
        self.node = node
        self.domain = domain
        self._values = values
        self.arguments = _bind(node)

    def value(self, name: str) -> Value:
        """Return the tensor given for argument `name`. Raises NoRule if there is none."""
        found = self.optional(name)
        if found is None:
            raise NoRule(f"argument {name} is not a tensor")
        return found

    def optional(self, name: str) -> Value | None:
        """Return the tensor given for argument `name`, or None if none was given."""
        given = self.arguments.get(name)
        return self._of(given) if isinstance(given, fx.Node) else None

    def tensors(self, name: str | None = None) -> list[Value]:
        """Return the tensors in list argument `name`, or among all arguments."""
        given: list[fx.Node] = []
        map_arg(self.arguments[name] if name else list(self.arguments.values()), given.append)
        found = [self._of(node) for node in given]
        return [value for value in found if value is not None]

    def constant(self, name: str, default: Any = None) -> Any:
        """Return a non-tensor argument; symbolic sizes get the value they had for the example inputs."""
        given = self.arguments.get(name)
        return default if given is None else _plain(given)

    def dim(self, name: str, ndim: int) -> int:
        """Return an axis argument as an index in [0, ndim)."""
        return int(self.constant(name, 0)) % max(ndim, 1)

    def dims(self, name: str, ndim: int) -> list[int]:
        """Return an argument that lists axes; all axes if it is None or empty."""
        given = self.constant(name)
        listed = [given] if isinstance(given, int) else list(given or range(ndim))
        return [int(d) % max(ndim, 1) for d in listed]

    def shape(self, output: int = 0) -> tuple[int, ...]:
        """Return the shape of an output of the operation."""
        shape = shape_of(_outputs(self.node)[output])
        if shape is None:
            raise NoRule("output shape depends on data")  # ends as `dimat.symmetry.interpret.DEPENDS` does
        return shape

    @property
    def output_count(self) -> int:
        return len(_outputs(self.node))

    def uses(self, output: int) -> bool:
        """Tell whether one of several outputs of the operation may be used."""
        return any(
            user.target is not operator.getitem or (user.args[1] == output and is_used(user))
            for user in self.node.users
        )

    @property
    def result_names(self) -> list[str]:
        """Names of the outputs in the operation's schema."""
        schema = getattr(self.node.target, "_schema", None)
        return [result.name for result in schema.returns] if schema else []

    def why(self, reason: str) -> Frozen:
        """Return a reason to freeze, at this node."""
        return Frozen(reason, self.node.name)

    def freeze(self, layouts: Iterable[Layout], reason: str) -> None:
        """Freeze axes for a reason, at this node. Their indices may be combined, the other axes staying apart."""
        listed = list(layouts)
        for layout in listed:
            self.domain.freeze(layout, self.why(reason))
        self.mix(listed, [layout for x in self.tensors() for layout in x.dims if layout not in listed])

    def look_up(self, axis: Layout, places: Iterable[Layout], by: str, apart: Iterable[Layout]) -> None:
        """Freeze an axis whose entries are looked up by the numbers in argument `by`, and become those of `places`."""
        self.domain.freeze(axis, self.why(self.by_number(by)))
        numbers = _same_numbers(self.arguments[by], _COUNTING if by == "offs" else set())
        self.domain.lookups.append(Lookup(axis, tuple(places), numbers, tuple(apart)))

    def by_number(self, by: str) -> str:
        """Return the reason for freezing an axis whose entries are looked up by the numbers in argument `by`: whether
        these are given as such, like words, or computed from other values."""
        words = "embedding" in op_name(self.node.target) or _is_given(self.arguments[by])
        return "looked up by index" if words else "chosen by number"

    def fixed(self, size: int, reason: str) -> Layout:
        """Return a new axis that never moves, for a reason, at this node."""
        return self.domain.fixed(size, self.why(reason))

    def mix(self, mixed: Iterable[Layout], apart: Iterable[Layout]) -> None:
        """Record that indices of some axes are combined with each other, those of the others staying apart."""
        self.domain.mixes.append((tuple(mixed), tuple(apart)))

    def taken(self, x: Value, axis: int, index: int) -> Value:
        """Return `x` at one index of an axis, without that axis."""
        others = (*x.dims[:axis], *x.dims[axis + 1 :])
        if choice := self.domain.choice_of(x.dims[axis]):
            return Value(tuple(self.domain.choose(layout, choice, index) for layout in others))
        self.domain.slice(x.dims[axis], index, index + 1)
        return Value(others)

    def broadcast(self, values: Sequence[Value], shape: Sequence[int]) -> tuple[Layout, ...]:
        """Unify axes of tensors that are broadcast to `shape`, and return the axes of the result."""
        dims: list[Layout] = []
        for position, size in enumerate(shape):
            meeting: list[Layout] = []
            for value in values:
                own = position - (len(shape) - value.ndim)
                if own >= 0 and layout_size(value.dims[own]) == size:
                    meeting.append(value.dims[own])
            for other in meeting[1:]:
                self.domain.unify(meeting[0], other)
            dims.append(meeting[0] if meeting else self.domain.fresh(size))
        return tuple(dims)

    def _of(self, node: fx.Node) -> Value | None:
        value = self._values.get(node)
        return value if isinstance(value, Value) else None


Rule = Callable[[Call], Result]
_RULES: dict[str, Rule] = {}
_foreign: set[str] = set()


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the decorated function for operations, named as in `aten.linear` or `aten.add.Tensor`."""

    def register(function: Rule) -> Rule:
        for name in names:
            _RULES[name] = function
        return function

    return register


def register_rule(op: Any, function: Rule) -> None:
    """Register a transfer rule for an operation, or replace the one it has.

    `op` is what `torch.ops` holds (an overload, or a packet for all its overloads) or its name, as in
    `mylib.scan`. `function` takes a `Call` and returns a `Value`, a list of values, or None.
    A wrong rule makes wrong permutations: check with `verify_symmetry`.
    Raises SymmetryError if `op` is neither an operation nor a name.
    """
    name = op.replace("::", ".") if isinstance(op, str) else op_name(op)
    if not name or "." not in name:
        raise SymmetryError(f"register_rule: {op!r} is not an operation; pass torch.ops.<library>.<name>")
    _RULES[name] = function
    _foreign.add(name)


def own_rules() -> bool:
    """Tell whether all rules are dimat's own: none was registered from outside."""
    return not _foreign


def op_name(target: Any) -> str:
    """Return `library.name.overload` of an operation, `library.name` of a packet, else an empty string.

    An operation that takes a function, as flex attention, is of library `higher_order`.
    """
    if isinstance(target, torch._ops.OpOverload):  # pyright: ignore[reportPrivateUsage]
        return str(target)
    if isinstance(target, torch._ops.OpOverloadPacket):  # pyright: ignore[reportPrivateUsage]
        return str(target)
    if isinstance(target, torch._ops.HigherOrderOperator):  # pyright: ignore[reportPrivateUsage]
        return f"higher_order.{target}"
    return ""


def find_rule(target: Any) -> Rule | None:
    """Return the rule of an operation: its overload's, its name's, or that of its out-of-place sibling."""
    full = op_name(target)
    name, _, overload = full.rpartition(".")
    for candidate in (full, name, f"{name.removesuffix('_')}.{overload}", name.removesuffix("_")):
        if candidate in _RULES:
            return _RULES[candidate]
    tags: set[Any] = set(getattr(target, "tags", ()))
    if torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags:
        return _RULES.get("pointwise")
    return None


def _bind(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a node by the names of its operation's schema, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {**{str(i): value for i, value in enumerate(node.args)}, **node.kwargs}
    bound: dict[str, Any] = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            bound[argument.name] = node.args[position]
        else:
            default = argument.default_value if argument.has_default_value() else None
            bound[argument.name] = node.kwargs.get(argument.name, default)
    return bound


def is_used(node: fx.Node) -> bool:
    """Tell whether anything that a graph returns, or writes into, may depend on a node."""
    found, seen = [*node.users], set[fx.Node]()
    while found:
        user = found.pop()
        if user in seen:
            continue
        if user.is_impure():
            return True
        seen.add(user)
        found.extend(user.users)
    return False


def _is_given(given: Any) -> bool:
    """Tell whether an index is made only of integers that are not computed from floating-point numbers."""
    found: list[fx.Node] = []
    map_arg(given, found.append)
    seen: set[fx.Node] = set()
    while found:
        node = found.pop()
        if node in seen:
            continue
        seen.add(node)
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
            return False
        found.extend(node.all_input_nodes)
    return True


_SAME_NUMBERS = {
    *(f"aten.{name}" for name in ("view", "reshape", "flatten", "clone", "contiguous")),
    *(f"aten.{name}" for name in ("to", "_to_copy", "detach", "alias")),
}


_COUNTING = {"aten.cumsum", "aten.histc", "aten.bincount"}
"""Operations that make the ends of runs of rows from the numbers of the groups to which rows belong."""


def _same_numbers(given: Any, counting: set[str]) -> Any:
    """Return the node that made an index's numbers, before they were viewed, copied or counted."""
    while isinstance(given, (list, tuple)):
        given = next((entry for entry in given if entry is not None), None)
    while isinstance(given, fx.Node) and op_name(given.target).rpartition(".")[0] in _SAME_NUMBERS | counting:
        given = given.args[0]
    return given


def _outputs(node: fx.Node) -> list[Any]:
    value = node.meta.get("val")
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _plain(given: Any) -> Any:
    if isinstance(given, (list, tuple)):
        return [_plain(item) for item in given]
    if isinstance(given, fx.Node):
        value = given.meta.get("val")
        size = hint(value)
        if size is None and not isinstance(value, float):
            raise NoRule("an argument depends on data")
        return value if size is None else size
    return hint(given) if isinstance(given, torch.SymInt) else given
