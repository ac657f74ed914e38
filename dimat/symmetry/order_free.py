"""Finds values in a graph that stay the same when experts change places.

Only these can be compared between networks: an expert's inputs, and sums over some of the experts, belong to other
tokens at a peer whose experts are in another order. No rule can determine these values, as rows are chosen by numbers;
so the graph is run with its experts in several orders.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from dimat.symmetry import tree
from dimat.symmetry.mute import muted
from dimat.symmetry.permute import permute_weights
from dimat.symmetry.spec import SymmetrySpec
from dimat.symmetry.trace import Trace
from dimat.symmetry.verify import randomised

_MOST_ORDERS = 16
_TOLERANCE = 1e-3


def order_dependent(
    model: nn.Module, traced: Trace, spec: SymmetrySpec, example_inputs: Any, groups: Collection[str]
) -> set[str]:
    """Return the names of nodes whose values change when the units of these groups change places, or are empty.

    The weights are random, and the units are shifted by up to 16 steps, all groups at once. If the graph cannot be run,
    all nodes are returned.
    """
    generator = torch.Generator().manual_seed(0)
    state = {name: value.detach() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    state = randomised(state, generator)
    for tied in traced.tied:
        state.update(dict.fromkeys(tied, state[tied[0]]))
    most = max(spec.sizes[group] for group in groups)
    shifts = range(1, most) if most <= _MOST_ORDERS else range(1, most, -(-most // _MOST_ORDERS))
    try:
        with muted(), torch.no_grad():  # operations raise and print what they like
            before = _values(traced, state, example_inputs)
            changed = {name for name, value in before.items() if not value.numel()}
            for shift in shifts:
                orders = {group: torch.arange(spec.sizes[group]).roll(shift) for group in groups}
                after = _values(traced, permute_weights(state, spec, orders), example_inputs)
                changed |= {name for name, value in before.items() if not _same(value, after[name])}
    except Exception:
        return {node.name for node in traced.nodes}
    return changed


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    finite = one[one.isfinite()]
    most = float(finite.abs().max()) if finite.numel() else 0.0
    return bool(torch.allclose(one, other, rtol=0.0, atol=_TOLERANCE * most, equal_nan=True))


def _values(traced: Trace, weights: Mapping[str, Tensor], example_inputs: Any) -> dict[str, Tensor]:
    """Return each node's value in a graph, if it is numeric; weights and inputs are not changed."""
    inputs = iter(tree.leaves(tree.as_arguments(example_inputs)))
    given: list[Any] = []
    for node in traced.nodes:
        if node.op == "placeholder":
            source = traced.sources[node.name]
            if source.kind == "input":
                value: Any = next(inputs, None)
            else:
                value = traced.constants.get(node.name) if source.kind == "constant" else weights[source.name]
            given.append(value.detach().clone() if isinstance(value, Tensor) else value)
    runner = _Runner(traced.module)
    runner.run(*given)
    return runner.values


class _Runner(fx.Interpreter):
    """Runs a graph and keeps the result of each operation."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        first: Any = value[0] if isinstance(value, tuple | list) and value else value  # as points have it
        if n.op == "call_function" and isinstance(first, Tensor) and first.is_floating_point():
            self.values[n.name] = first.detach().clone()
        return value
