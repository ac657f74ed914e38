"""Transfer rules: how each aten operation relates the axes of its inputs to those of its outputs.

One file per family; importing this package registers them all. `register_rule` adds one for an operation
that dimat does not know.
"""

from dimat.symmetry.rules import (
    attention,
    conv,
    create,
    join,
    linear,
    norm,
    pointwise,
    random,
    recurrent,
    reduce,
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
    "conv",
    "create",
    "find_rule",
    "join",
    "linear",
    "norm",
    "own_rules",
    "pointwise",
    "random",
    "recurrent",
    "reduce",
    "register_rule",
    "shape",
    "spatial",
]
