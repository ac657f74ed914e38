"""Checks a spec numerically: random group elements must not change a module's outputs."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dimat.errors import SymmetryError
from dimat.symmetry import tree
from dimat.symmetry.copy_module import copy_module
from dimat.symmetry.coverage import coverage_of, moved_entries
from dimat.symmetry.paths import unwrapped
from dimat.symmetry.permute import permute_weights, random_permutations
from dimat.symmetry.spec import AxisRef, Factor, FrozenAxis, Layout, SymmetrySpec, groups_in, with_hash
from dimat.symmetry.stacks import with_stacks
from dimat.symmetry.steady import steady
from dimat.symmetry.trace import SymmetryWarning, first_line, forget_derived, retrace

_TRIALS = 2


def verify_symmetry(model: nn.Module, spec: SymmetrySpec, example_inputs: Any, generator: torch.Generator) -> float:
    """Return the worst relative change of an output under random group elements (0 is perfect).

    A copy of the module runs in float64 (float32 if it cannot) and eval mode, without values that it has cached from
    its weights; its vectors, normalisation statistics and constant tensors are first made random, and its small
    matrices larger, so that fresh layers (all ones, all zeros, nearly zero) cannot hide an error. Each selected
    output's largest absolute change is divided by its largest absolute value. Expect below `tolerance_of`.
    `generator` is a CPU generator.
    Raises SymmetryError if the module has no floating-point output, or the spec does not fit it.
    """
    return _Check(model, example_inputs, spec, generator).error(spec, generator)


def holds(model: nn.Module, spec: SymmetrySpec, example_inputs: Any, generator: torch.Generator) -> bool:
    """Tell whether a spec fits a module and all of its groups at once pass `verify_symmetry`."""
    try:
        check = _Check(model, example_inputs, spec, generator)
        return check.error(spec, generator) <= check.tolerance
    except (SymmetryError, LookupError, RuntimeError):  # it names outputs, tensors or sizes that the module lacks
        return False


def tolerance_of(model: nn.Module, spec: SymmetrySpec, example_inputs: Any) -> float:
    """Return the error below which a group passes: 1e-9, or 1e-5 if the module itself computes in less than float64.

    Many normalisations and rotary embeddings convert their inputs to float32 first.
    """
    return _Check(model, example_inputs, spec, torch.Generator().manual_seed(0)).tolerance


class _Check:
    """A module with random weights, and its outputs."""

    def __init__(self, model: nn.Module, example_inputs: Any, spec: SymmetrySpec, generator: torch.Generator) -> None:
        seed = generator.get_state()
        causes: list[Exception] = []
        for dtype, draw, watched in _WAYS:
            generator.set_state(seed)
            try:
                self._prepare(model, example_inputs, spec, generator, dtype, draw, watched)
            except SymmetryError:
                raise
            except Exception as error:  # a forward pass raises whatever the model's code does
                causes.append(error)
            else:
                if not any(bool(output.isnan().any()) for output in self._before):
                    return
        if causes:
            told = f"{type(causes[0]).__name__}: {first_line(causes[0])}"
            raise SymmetryError(f"the model cannot be run, so invariance cannot be checked: {told}") from causes[0]
        raise SymmetryError("the model returns NaN for the example inputs; give inputs as in training")

    def _prepare(
        self,
        model: nn.Module,
        inputs: Any,
        spec: SymmetrySpec,
        generator: torch.Generator,
        dtype: torch.dtype,
        draw: _Draw,
        watched: bool,
    ) -> None:
        self._watched = watched
        if not watched and "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # what was compiled while operations were watched fails without
        self._model = copy_module(model)

        def cast(tensor: Tensor) -> Tensor:
            return _cast(tensor, dtype)

        self._model._apply(cast)  # pyright: ignore[reportPrivateUsage]  (`to` would drop imaginary parts)
        self._model.eval()
        forget_derived(self._model)
        self._memo = {id(t): t for t in (*self._model.parameters(), *self._model.buffers())}
        state = {name: v.detach() for name, v in self._model.state_dict().items() if isinstance(v, Tensor)}
        self._weights = draw(state, generator)
        for tied in spec.tied:
            for name in tied[1:]:
                self._weights[name] = self._weights[tied[0]]
        self._inputs = tree.map_tensors(cast, tree.as_arguments(inputs))
        watch = _Precision()
        with watch if watched else nullcontext():
            self._before = self._run(self._weights, spec)
        self.tolerance = 1e-9 if watched and not watch.rounds and dtype == torch.float64 else 1e-5

    def error(self, spec: SymmetrySpec, generator: torch.Generator) -> float:
        """Return the worst relative change under random elements of a spec's groups."""
        worst = 0.0
        for _ in range(_TRIALS):
            moved = permute_weights(self._weights, spec, random_permutations(spec, generator))
            for one, other in zip(self._before, self._run(moved, spec)):
                change = _change(one, other)
                worst = max(worst, change if change == change else float("inf"))
            del moved  # as large as the module: the next must not stand beside it
        return worst

    def _run(self, weights: dict[str, Tensor], spec: SymmetrySpec) -> list[Tensor]:
        # what the module writes in place (inputs, buffers) or keeps for later must not reach the next run
        model = copy_module(self._model, self._memo)
        args, kwargs = tree.map_tensors(torch.clone, self._inputs)
        buffers = {name: weights[name].clone() for name, _ in model.named_buffers() if name in weights}
        with torch.no_grad(), warnings.catch_warnings(), steady() if self._watched else nullcontext():
            warnings.simplefilter("ignore")
            inner, own = unwrapped(model, {**weights, **buffers})
            result = torch.func.functional_call(inner, own, args, kwargs, tie_weights=False)
        leaves = tree.leaves(result)
        chosen = [leaves[index] for index in spec.outputs] if spec.outputs else leaves
        tensors = [_real(leaf) for leaf in chosen if isinstance(leaf, Tensor) and _is_continuous(leaf)]
        if not tensors:
            raise SymmetryError("the model returns no floating-point tensor, so invariance cannot be checked")
        return [tensor for tensor in tensors if tensor.numel()]


def _change(one: Tensor, other: Tensor) -> float:
    """Return the largest relative change; entries that are infinite in both (masked scores) are no change."""
    finite = one.isfinite()
    if not torch.equal(one[~finite], other[~finite]):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    return float((one - other)[finite].abs().max()) / max(float(one[finite].abs().max()), 1e-300)


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _real(tensor: Tensor) -> Tensor:
    """Return a tensor in float64; a complex one as pairs."""
    return torch.view_as_real(tensor.resolve_conj().to(torch.complex128)) if tensor.is_complex() else tensor.double()


class _Precision(TorchDispatchMode):
    """Detects operations on float64 whose result is of a smaller type."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to be kept from torch's compiler would load it: a CPU-second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.rounds:
            given = [leaf for leaf in tree.leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            made = [leaf for leaf in tree.leaves(result) if isinstance(leaf, Tensor)]
            self.rounds = any(t.dtype in (torch.float64, torch.complex128) for t in given) and any(
                _is_continuous(t) and t.itemsize < (16 if t.is_complex() else 8) for t in made
            )
        return result


def freeze_failing(
    model: nn.Module,
    spec: SymmetrySpec,
    example_inputs: Any,
    generator: torch.Generator,
    tolerance: float | None = None,
) -> SymmetrySpec:
    """Return the spec without the groups that fail `verify_symmetry`, found by bisection; the spec itself if none does.

    `tolerance`: the error from which a group fails; by default `tolerance_of` the module.
    Each failing group is listed in `warnings`, with a `SymmetryWarning` (SYM-E03), and its axes as frozen.
    Raises SymmetryError as `verify_symmetry` does.
    """
    check = _Check(model, example_inputs, spec, generator)
    most = check.tolerance if tolerance is None else tolerance

    def failing(groups: list[str]) -> dict[str, float]:
        others = {group.id for group in spec.groups} - set(groups)
        error = check.error(without_groups(spec, others, ""), generator)
        if error <= most:
            return {}
        if len(groups) == 1:
            return {groups[0]: error}
        half = len(groups) // 2
        # groups that fail together only are all given up
        return {**failing(groups[:half]), **failing(groups[half:])} or dict.fromkeys(groups, error)

    culprits = failing([group.id for group in spec.groups])
    if not culprits:
        return spec
    messages = [f"SYM-E03 group {name} failed invariance (err={err:.1e}); frozen" for name, err in culprits.items()]
    for message in messages:
        warnings.warn(message, SymmetryWarning, stacklevel=2)
    kept = without_groups(spec, set(culprits), "failed the invariance check")
    shapes = with_stacks({name: tuple(p.shape) for name, p in model.named_parameters()}, kept.stacks)
    kept = replace(kept, warnings=(*kept.warnings, *messages), coverage=coverage_of(kept, shapes))
    return with_hash(kept, retrace(model, example_inputs).digest)


def without_groups(spec: SymmetrySpec, gone: set[str], reason: str) -> SymmetrySpec:
    """Return the spec with the factors of some groups, and of groups that depend on them, frozen."""
    gone = gone | {group.id for group in spec.groups if not gone.isdisjoint(group.parents)}
    axes = tuple(AxisRef(axis.tensor, axis.dim, _frozen(axis.layout, gone)) for axis in spec.axes)
    moving = tuple(axis for axis in axes if groups_in(axis.layout))
    wanted = {parent for group in spec.groups if group.id not in gone for parent in group.parents}
    numbered = tuple(group for group in spec.numbered if group.id in wanted)
    groups = tuple(group for group in spec.groups if group.id not in gone)
    left, all_ids = {group.id for group in groups}, {group.id for group in spec.groups}
    frozen = tuple(
        FrozenAxis(a.tensor, a.dim, reason, "", moved_entries(a.layout, all_ids) - moved_entries(a.layout, left))
        for a in spec.axes
        if groups_in(a.layout) & gone
    )
    return replace(spec, groups=groups, axes=moving, frozen=spec.frozen + frozen, numbered=numbered)


def _frozen(layout: Layout, gone: set[str]) -> Layout:
    return tuple(
        tuple(
            Factor(f.size, None if f.group in gone else f.group, None if f.parts is None else _frozen(f.parts, gone))
            for f in segment
        )
        for segment in layout
    )


def randomised(state: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Return a state dict in which no two units are equal, and all have an effect.

    Vectors and tensors that are constant along an axis get noise; matrices that are smaller than 1/√(inputs of a unit)
    are scaled up to it, since attention with all scores near 0 does not show which unit meets which.
    """
    result = dict(state)
    for name, value in state.items():
        if not _is_continuous(value) or value.ndim == 0:
            continue
        flat = value.ndim == 1 or name.endswith(("running_mean", "running_var"))
        fan = max(value[0].numel(), 1)
        alike = any(n > 1 and bool((value == value.narrow(d, 0, 1)).all()) for d, n in enumerate(value.shape))
        if not flat and not alike:
            if value.ndim < 4:
                result[name] = value * max(1.0, fan**-0.5 / max(float(value.std()), 1e-30))
            continue
        kind = torch.complex128 if value.is_complex() else torch.float64
        noise = torch.randn(value.shape, generator=generator, dtype=kind).to(value)
        if name.endswith("running_var"):
            result[name] = 0.5 + noise.abs()
        else:
            result[name] = value + noise * (0.3 if flat else fan**-0.5)
    return result


def _gentle(state: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Return a state dict whose entries keep their signs and sizes, for models that are NaN under other weights."""

    def shaken(value: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        return value * (0.1 * noise).exp().to(value.real if value.is_complex() else value)

    return {name: shaken(value) if _is_continuous(value) else value for name, value in state.items()}


_Draw = Callable[[dict[str, Tensor], torch.Generator], dict[str, Tensor]]
_WAYS: tuple[tuple[torch.dtype, _Draw, bool], ...] = (
    (torch.float64, randomised, True),
    (torch.float64, randomised, False),  # operations that cannot be watched, as `torch.cond`
    (torch.float32, randomised, True),  # operations that have no float64 form, or masks that overflow in it
    (torch.float32, randomised, False),
    (torch.float64, _gentle, True),
    (torch.float32, _gentle, True),
)
"""Ways to run a module, of which the first that works is used: precision, weights, and whether operations are
watched."""
