"""The methods of each stage of the merge by name, filled by scanning the stage's folder (see `dimat.registry`).

@combine_registry.register("median")
def median(own, peers, weights, *, alpha: float = 0.5): ...

A combine method that asks for `aux` says how agents take its statistics (`dimat.merge.shared_statistics`):

@combine_registry.register("fisher", statistics=empirical_fisher)

One that merges products of LoRA factors, not tensor by tensor, is registered with `lora_products=True`.
"""

from __future__ import annotations

from typing import Any

from dimat.merge.stages import Accepted, Aligned, Repaired
from dimat.registry import Registry

CONTEXT = frozenset(
    {"base", "aux", "names", "generator", "state", "model", "spec", "data", "score", "points", "observer", "repair"}
)
"""Keyword arguments that the pipeline fills; they can never be options."""

align_registry: Registry[Aligned] = Registry("align method", "dimat.merge.align", context=CONTEXT)
combine_registry: Registry[dict[str, Any]] = Registry("combine method", "dimat.merge.combine", context=CONTEXT)
repair_registry: Registry[Repaired] = Registry("repair method", "dimat.merge.repair", context=CONTEXT)
accept_registry: Registry[Accepted] = Registry("accept rule", "dimat.merge.accept", context=CONTEXT)


def product_methods() -> list[str]:
    """Return the combine methods that merge products of LoRA factors, sorted."""
    return [name for name in combine_registry.names() if combine_registry.declared(name, "lora_products")]
