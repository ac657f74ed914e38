"""LSTM, GRU and plain RNN: the gate axis of every weight is a copy of the hidden axis for each gate."""

from __future__ import annotations

import operator

from torch import fx

from dimat.symmetry.atoms import Layout
from dimat.symmetry.rules.call import Call, NoRule, Result, Value, op_name, rule

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule(*(f"aten.{name}.input" for name in _GATES))
def recurrent(call: Call) -> Result:
    """Weights (gates · hidden, in) and (gates · hidden, hidden) and biases, for each layer and direction.

    The states handed in and out have one axis for all layers, which ties their units to each other, except
    where the state handed in is all zeros, or those handed out are not used.
    """
    gates = _GATES[op_name(call.node.target).split(".")[1]]
    directions = 2 if call.constant("bidirectional") else 1
    layers, biased = int(call.constant("num_layers")), bool(call.constant("has_biases"))
    weights = call.tensors("params")
    each = 4 if biased else 2
    if len(weights) != layers * directions * each:
        raise NoRule("projections inside a recurrent layer")
    x = call.value("input")
    below = x.dims[-1]
    hidden: list[Layout] = []
    for layer in range(layers):
        made: list[Layout] = []
        for direction in range(directions):
            first = (layer * directions + direction) * each
            from_input, from_hidden, *biases = weights[first : first + each]
            units = call.domain.fresh(from_hidden.shape[1])
            gate_axis = call.domain.concat([units] * gates)
            call.domain.unify(from_hidden.dims[1], units)
            call.domain.unify(from_input.dims[1], below)
            call.mix([units], [gate_axis])
            call.mix([below], [gate_axis])
            for value in (from_input, from_hidden, *biases):
                call.domain.unify(value.dims[0], gate_axis)
            made.append(units)
        hidden += made
        below = call.domain.concat(made)
    call.freeze([x.dims[0 if not call.constant("batch_first") else -2]], "steps of a sequence")
    return _states(call, hidden, Value((*x.dims[:-1], below)))


def _states(call: Call, hidden: list[Layout], output: Value) -> Result:
    given = call.arguments["hx"]
    nodes: list[fx.Node] = list(given) if isinstance(given, (list, tuple)) else [given]
    for node, value in zip(nodes, call.tensors("hx"), strict=True):
        if op_name(node.target) != "aten.zeros.default":
            call.freeze(value.dims[:1], "numbers layers")
            for units in hidden:
                call.domain.unify(value.dims[-1], units)
    taken = [user for user in call.node.users if user.target is operator.getitem and user.users]
    numbers = [user.args[1] for user in taken]
    outputs: list[Value | None] = [output]
    for number in range(1, call.output_count):
        if number in numbers:
            for units in hidden[1:]:
                call.domain.unify(hidden[0], units)
        shape = call.shape(number)
        last = hidden[0] if number in numbers else call.fixed(shape[-1], "unused")
        outputs.append(Value((*(call.fixed(size, "state of a layer") for size in shape[:-1]), last)))
    return outputs
