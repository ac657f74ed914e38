"""Merging: tensor maths over state dicts, without network, event loop or I/O."""

from dimat.merge.api import align_weights, merge_weights
from dimat.merge.context import MergeContext
from dimat.merge.pipeline import MergeOutcome, Peer, adopt, merge
from dimat.merge.plan import MergePlan, needs_symmetry, plan_merge
from dimat.merge.registry import accept_registry, align_registry, combine_registry, product_methods, repair_registry
from dimat.merge.stages import Accepted, Aligned, Permutations, Repaired
from dimat.merge.weight_views import open_weights

__all__ = [
    "Accepted",
    "Aligned",
    "MergeContext",
    "MergeOutcome",
    "MergePlan",
    "Peer",
    "Permutations",
    "Repaired",
    "accept_registry",
    "adopt",
    "align_registry",
    "align_weights",
    "combine_registry",
    "merge",
    "merge_weights",
    "needs_symmetry",
    "open_weights",
    "plan_merge",
    "product_methods",
    "repair_registry",
]
