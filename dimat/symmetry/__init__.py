"""Symmetry groups of a module: units that can be permuted without changing its function.

`derive_symmetry` gives a `SymmetrySpec`; `permute_weights` and `permute_optimizer` apply permutations of its
groups; `verify_symmetry` checks it numerically; `Observer` reads activations at its observation points.
No architecture is described by hand: the module is traced, and one transfer rule for each operation says how
axes relate. `register_rule` adds rules.
"""

from dimat.symmetry.cache import verified_symmetry
from dimat.symmetry.derive import derive_symmetry, observation_points
from dimat.symmetry.moments import permute_optimizer
from dimat.symmetry.observe import Observer, points_at
from dimat.symmetry.permute import (
    Permutations,
    compose_permutations,
    invert_permutations,
    permute_weights,
    random_permutations,
)
from dimat.symmetry.rules import Call, NoRule, Value, register_rule
from dimat.symmetry.spec import (
    AxisRef,
    Factor,
    FrozenAxis,
    Group,
    Layout,
    ObservationPoint,
    Segment,
    SymmetrySpec,
    UnknownOp,
)
from dimat.symmetry.trace import SymmetryWarning, Trace, trace
from dimat.symmetry.verify import freeze_failing, tolerance_of, verify_symmetry

__all__ = [
    "AxisRef",
    "Call",
    "Factor",
    "FrozenAxis",
    "Group",
    "Layout",
    "NoRule",
    "ObservationPoint",
    "Observer",
    "Permutations",
    "Segment",
    "SymmetrySpec",
    "SymmetryWarning",
    "Trace",
    "UnknownOp",
    "Value",
    "compose_permutations",
    "derive_symmetry",
    "freeze_failing",
    "invert_permutations",
    "observation_points",
    "permute_optimizer",
    "permute_weights",
    "points_at",
    "random_permutations",
    "register_rule",
    "tolerance_of",
    "trace",
    "verified_symmetry",
    "verify_symmetry",
]
