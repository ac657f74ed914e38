"""Fingerprint a module by its code and constructor state, without tracing or running it.

A fingerprint covers the files of the classes in the module's tree and the code to which they refer, the attributes set
by the constructors, names, shapes and dtypes of the tensors, and the kind of inputs. If fingerprints are equal, two
modules almost certainly have the same graph. A module whose code cannot be named (hooks, lambdas, classes made inside a
function, replaced methods) has none.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from blake3 import blake3
from torch import nn

from dimat.symmetry import tree

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_NAMED = (*_PLAIN, torch.dtype, torch.device, torch.layout, torch.memory_format, np.generic)
"""Types of values that `repr` describes completely."""
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_OWN = {"training", "_parameters", "_buffers", "_modules"}
"""Attributes of every module that are covered in other ways, or do not matter in eval mode."""


class _Unnameable(Exception):
    """Some part of a module cannot be identified by names and plain values."""


def fingerprint(model: nn.Module, example_inputs: Any) -> str | None:
    """Return a hex blake3 of everything that determines a module's graph, or None if its code cannot be named.

    Modules count as in eval mode. Values of parameters, buffers and inputs are not included; their shapes, dtypes and
    devices are. It is the same in every process with the same files, torch and Python.
    """
    try:
        return _Description(model).of(example_inputs)
    except (_Unnameable, RecursionError):
        return None


class _Description:
    """A description of a module, as a sequence of words."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._number = {id(module): number for number, module in enumerate(model.modules())}
        self._met: dict[int, tuple[int, Any]] = {}
        """Objects found among the attributes by id, with their numbers; kept, so that no id is used again."""
        self._sources: dict[str, bool] = {}
        """Names of Python modules referred to; whether they define a class of the tree."""

    def of(self, example_inputs: Any) -> str:
        words = [sys.version, torch.__version__, str(torch.get_default_dtype())]
        for path, module in self._model.named_modules(remove_duplicate=False):
            words += [path, str(self._number[id(module)])]
        for module in self._model.modules():
            words += self._module(module)
        words += self._tensors()
        words.append(self._value(tree.as_arguments(example_inputs)))
        words += self._code()
        return blake3("\x1e".join(words).encode()).hexdigest()

    def _module(self, module: nn.Module) -> Iterable[str]:
        kind = type(module)
        if isinstance(module, torch.jit.ScriptModule):
            raise _Unnameable("compiled code")
        for base in kind.__mro__:
            self._class(base)
            if _top(base.__module__) not in ("torch", "builtins"):
                yield from self._methods(base)
                yield from _plain_entries(vars(base))
        yield _name(kind)
        for name, value in vars(module).items():
            if name in _OWN or "state_dict" in name:
                continue
            if "hooks" in name or (isinstance(value, Callable) and hasattr(kind, name)):
                if value:
                    raise _Unnameable(f"{name} of {kind.__name__} was set from outside")
                continue
            yield f"{name}={self._value(value)}"

    def _methods(self, kind: type) -> Iterable[str]:
        """Yield the functions of a class's methods, and make sure that their sources are read."""
        for name, member in vars(kind).items():
            for function in _functions(member):
                known = _functions(_found(function.__module__, function.__qualname__))
                free = set(function.__code__.co_freevars) - {"__class__"}
                if free or all(function.__code__ is not other.__code__ for other in known):
                    raise _Unnameable(f"{kind.__name__}.{name} is not found by its name")
                self._refer(function.__module__, defines=True)
                yield f"{name} is {_name(function)}"

    def _tensors(self) -> Iterable[str]:
        kept = self._model.state_dict(keep_vars=True)
        same: dict[int, int] = {}
        for kind, named in (
            ("parameter", self._model.named_parameters(remove_duplicate=False)),
            ("buffer", self._model.named_buffers(remove_duplicate=False)),
        ):
            for name, tensor in named:
                number = same.setdefault(id(tensor), len(same))
                yield f"{kind} {name} {name in kept} {number} {_name(type(tensor))} {_tensor(tensor)}"

    def _value(self, value: Any) -> str:
        """Return a value in words; raises _Unnameable for values without a lasting name."""
        if isinstance(value, Enum):
            return f"{self._class(type(value))}.{value.name}"
        if isinstance(value, _NAMED):
            return f"{type(value).__name__} {value!r}"
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, torch.Tensor):  # as a constant of the graph its values have no part in it
            return _tensor(value)
        if isinstance(value, _FUNCTIONS):
            return self._function(value)
        if isinstance(value, types.ModuleType):
            self._refer(value.__name__)
            return f"module {value.__name__}"
        if isinstance(value, logging.Logger):
            return f"logger {value.name}"
        if id(value) in self._number:
            return f"submodule {self._number[id(value)]}"
        if not isinstance(value, tuple):  # whether equal tuples are one object is chance
            if id(value) in self._met:
                return f"object {self._met[id(value)][0]}"
            self._met[id(value)] = (len(self._met), value)
        return f"{self._class(type(value))}({self._content(value)})"

    def _content(self, value: Any) -> str:
        if isinstance(value, (set, frozenset)):
            return ", ".join(sorted(map(self._value, cast("set[Any]", value))))
        if isinstance(value, (tuple, list)):
            return ", ".join(map(self._value, cast("list[Any]", value)))
        if isinstance(value, dict):
            items = cast("dict[Any, Any]", value).items()
            return ", ".join(f"{self._value(key)}: {self._value(item)}" for key, item in items)
        if isinstance(value, np.ndarray) and value.dtype != object:
            return f"{value.dtype} {value.shape} {blake3(value.tobytes()).hexdigest()}"
        if isinstance(value, functools.partial):
            return self._value((value.func, value.args, value.keywords))
        if isinstance(value, types.MethodType):
            return self._value((value.__func__, value.__self__))
        held = getattr(value, "__dict__", None)
        if held is None or isinstance(value, nn.Module):
            raise _Unnameable(f"a {type(value).__name__} among the attributes")
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        entries = {**held, **{name: getattr(value, name, None) for name in slots}}
        # a hash that an object keeps of itself is another one in each process
        return self._value({name: entries[name] for name in sorted(entries) if "hash" not in name})

    def _class(self, kind: type) -> str:
        """Return a class by name, if it can be found by it."""
        self._refer(kind.__module__, defines=True)
        if _found(kind.__module__, kind.__qualname__) is not kind:
            raise _Unnameable(f"class {_name(kind)} is not found by its name")
        return _name(kind)

    def _function(self, function: Any) -> str:
        home = function.__module__
        if isinstance(function, types.BuiltinFunctionType):
            owner = function.__self__
            return f"built-in {getattr(owner, '__name__', _name(type(owner)))}.{function.__name__}"
        if _found(home, function.__qualname__) is not function:
            raise _Unnameable(f"function {_name(function)} is not found by its name")
        self._refer(home, defines=True)
        return f"function {_name(function)}"

    def _refer(self, module: str, *, defines: bool = False) -> None:
        self._sources[module] = self._sources.get(module, False) or defines

    def _code(self) -> Iterable[str]:
        """Yield the content of all code that was referred to, and of the code that it refers to in turn.

        Installed packages are identified by their versions; the module that defines a class also by its content.
        """
        done: dict[str, bool] = {}
        while waiting := [name for name, defines in self._sources.items() if defines > done.get(name, -1)]:
            for name in sorted(waiting):
                done[name] = self._sources[name]
                yield from self._source(name, defines=done[name])

    def _source(self, name: str, *, defines: bool) -> Iterable[str]:
        if name not in sys.modules:
            raise _Unnameable(f"module {name} is not loaded")
        module, top = sys.modules[name], _top(name)
        file = getattr(module, "__file__", None)
        if top == "torch" or top in sys.stdlib_module_names or (file is None and hasattr(module, "__path__")):
            return  # known by the versions of torch and Python; a folder of packages has no code
        packaged = top == "dimat" or bool({"site-packages", "dist-packages"} & {*Path(file or "").parts})
        if packaged:
            yield f"{top} {getattr(sys.modules.get(top), '__version__', '')}"
        if packaged and not defines:
            return
        try:
            content = Path(file or "").read_bytes()
        except OSError as error:
            raise _Unnameable(f"the source of {name} cannot be read") from error
        yield f"{name} {blake3(content).hexdigest()}"
        if not packaged:
            yield from _plain_entries(vars(module))
        for key, value in sorted(vars(module).items()):
            if isinstance(value, types.ModuleType):
                self._refer(value.__name__)
                yield f"{key} is {value.__name__}"
            elif isinstance(value, (type, types.FunctionType)):
                if value.__module__ in sys.modules:
                    self._refer(value.__module__)
                yield f"{key} is {_name(value)}"


def _tensor(tensor: torch.Tensor) -> str:
    return f"tensor {tuple(tensor.shape)} {tensor.dtype} {tensor.device.type}"


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _top(module: str) -> str:
    return module.partition(".")[0]


def _found(module: str, name: str) -> Any:
    """Return the object under a dotted name of a loaded module, or None."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = inspect.getattr_static(found, part, None)
    return found


def _functions(member: Any) -> list[types.FunctionType]:
    """Return the functions that a class's or module's entry is made of, without their decorators."""
    parts: tuple[Any, ...] = (member.fget, member.fset) if isinstance(member, property) else (member,)
    plain = [part.__func__ if isinstance(part, (staticmethod, classmethod)) else part for part in parts]
    return [each for each in map(inspect.unwrap, plain) if isinstance(each, types.FunctionType)]


def _plain_entries(namespace: Mapping[str, Any]) -> Iterable[str]:
    """Yield the numbers and strings that a class or module holds, which may have been set since it was loaded."""
    for key, value in sorted(namespace.items()):
        if not key.startswith("__") and isinstance(value, _PLAIN):
            yield f"{key} = {value!r}"
