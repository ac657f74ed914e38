"""LSTM, GRU and plain RNN: every gate's axis is a copy of the hidden axis."""

from __future__ import annotations

import operator

from torch import fx

from dimat.symmetry.atoms import Layout
from dimat.symmetry.rules.call import Call, NoRule, Result, Value, is_used, op_name, rule

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule(*(f"aten.{name}.{kind}" for name in _GATES for kind in ("input", "data")))
def recurrent(call: Call) -> Result:
    """Weights (gates · hidden, in) and (gates · hidden, hidden) and biases, for each layer and direction.

    An LSTM with projections has one matrix more, (projected, hidden): what goes from step to step is then projected.
    The states handed in and out have one axis for all layers, which ties their units to each other, except
    where the state handed in is all zeros, or those handed out are not used. Of packed sequences (`data`) the first
    axis runs over all their steps.
    """
    gates = _GATES[op_name(call.node.target).split(".")[1]]
    directions = 2 if call.constant("bidirectional") else 1
    layers, biased = int(call.constant("num_layers")), bool(call.constant("has_biases"))
    weights = call.tensors("params")
    each = len(weights) // (layers * directions)
    plain = 4 if biased else 2
    if each not in (plain, plain + 1) or each * layers * directions != len(weights):
        raise NoRule("an unusual number of weights in a recurrent layer")
    packed = "data" in call.arguments
    x = call.value("data" if packed else "input")
    below = x.dims[-1]
    hidden: list[Layout] = []
    cells: list[Layout] = []
    for layer in range(layers):
        made: list[Layout] = []
        for direction in range(directions):
            first = (layer * directions + direction) * each
            of_layer = weights[first : first + each]
            units, handed_on = _layer(call, gates, below, of_layer[:plain], of_layer[plain:])
            cells.append(units)
            made.append(handed_on)
        hidden += made
        below = call.domain.concat(made)
    if packed:
        call.freeze([x.dims[0], *call.value("batch_sizes").dims], "steps of a sequence")
    else:
        call.freeze([x.dims[0 if not call.constant("batch_first") else -2]], "steps of a sequence")
    return _states(call, [hidden, cells], Value((*x.dims[:-1], below)))


def _layer(
    call: Call, gates: int, below: Layout, weights: list[Value], projection: list[Value]
) -> tuple[Layout, Layout]:
    """Relate the weights of one layer in one direction; return its units, and those that it hands on."""
    from_input, from_hidden, *biases = weights
    units = call.domain.fresh(from_hidden.shape[0] // gates)
    handed_on = units
    for matrix in projection:
        call.domain.unify(matrix.dims[1], units)
        call.mix([units], matrix.dims[:1])
        handed_on = matrix.dims[0]
    gate_axis = call.domain.concat([units] * gates)
    call.domain.unify(from_hidden.dims[1], handed_on)
    call.domain.unify(from_input.dims[1], below)
    call.mix([handed_on], [gate_axis])
    call.mix([below], [gate_axis])
    for value in (from_input, from_hidden, *biases):
        call.domain.unify(value.dims[0], gate_axis)
    return units, handed_on


@rule("aten.lstm_cell", "aten.gru_cell", "aten.rnn_tanh_cell", "aten.rnn_relu_cell")
def cell(call: Call) -> Result:
    """One step: its weights are those of a layer, its state (batch, hidden) is handed in and out."""
    gates = _GATES[op_name(call.node.target).split(".")[1].removesuffix("_cell")]
    x, states = call.value("input"), call.tensors("hx")
    names = ("w_ih", "w_hh", "b_ih", "b_hh")
    weights = [value for name in names if (value := call.optional(name)) is not None]
    units, _ = _layer(call, gates, x.dims[-1], weights, [])
    for state in states:
        call.domain.unify(state.dims[-1], units)
    leading = call.broadcast([Value(value.dims[:-1]) for value in (x, *states)], x.shape[:-1])
    made = Value((*leading, units))
    return made if call.output_count == 1 else [made for _ in range(call.output_count)]


@rule("aten._pack_padded_sequence")
def pack(call: Call) -> Result:
    """(steps, batch, …), or batch first, becomes one axis of all steps that are there."""
    x = call.value("input")
    call.freeze([*x.dims[:2], *call.value("lengths").dims], "steps of a sequence")
    steps, sizes = (call.fixed(call.shape(number)[0], "steps of a sequence") for number in (0, 1))
    return [Value((steps, *x.dims[2:])), Value((sizes,))]


@rule("aten._pad_packed_sequence")
def unpack(call: Call) -> Result:
    """The inverse of packing."""
    x = call.value("data")
    call.freeze([x.dims[0], *call.value("batch_sizes").dims], "steps of a sequence")
    padded, lengths = call.shape(0), call.shape(1)
    outer = (call.fixed(size, "steps of a sequence") for size in padded[:2])
    return [Value((*outer, *x.dims[1:])), Value(tuple(call.fixed(n, "lengths of sequences") for n in lengths))]


def _states(call: Call, kinds: list[list[Layout]], output: Value) -> Result:
    """Relate the states handed in and out: the units handed on, and (of an LSTM) those of its cells."""
    given = call.arguments["hx"]
    nodes: list[fx.Node] = list(given) if isinstance(given, (list, tuple)) else [given]
    for node, value, of_layers in zip(nodes, call.tensors("hx"), kinds):
        if op_name(node.target) != "aten.zeros.default":
            call.freeze(value.dims[:1], "numbers layers")
            for units in of_layers:
                call.domain.unify(value.dims[-1], units)
    taken = [user for user in call.node.users if user.target is operator.getitem and is_used(user)]
    numbers = [user.args[1] for user in taken]
    outputs: list[Value | None] = [output]
    for number, of_layers in zip(range(1, call.output_count), kinds):
        if number in numbers:
            for units in of_layers[1:]:
                call.domain.unify(of_layers[0], units)
        shape = call.shape(number)
        last = of_layers[0] if number in numbers else call.fixed(shape[-1], "unused")
        outputs.append(Value((*(call.fixed(size, "state of a layer") for size in shape[:-1]), last)))
    return outputs
