"""Transfer rules: how each aten operation relates its inputs' axes to its outputs'.

One file per family; importing this package registers them all. `register_rule` adds one for an operation
that dimat does not know.
"""

from dimat.symmetry.rules import (
    attention,
    complex,
    conv,
    create,
    distance,
    join,
    linear,
    norm,
    pointwise,
    quantize,
    random,
    recurrent,
    reduce,
    scatter,
    shape,
    spatial,
)
from dimat.symmetry.rules.call import Call, NoRule, Rule, Value, find_rule, own_rules, register_rule

__all__ = [
    "Call",
    "NoRule",
    "Rule",
    "Value",
    "attention",
    "complex",
    "conv",
    "create",
    "distance",
    "find_rule",
    "join",
    "linear",
    "norm",
    "own_rules",
    "pointwise",
    "quantize",
    "random",
    "recurrent",
    "reduce",
    "register_rule",
    "scatter",
    "shape",
    "spatial",
]
