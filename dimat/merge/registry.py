"""The methods of each stage of the merge, by name; a stage's folder is scanned for them.

@combine_registry.register("median", holds="pieces")
def median(own, peers, weights, *, alpha: float = 0.5): ...

A method is one file: all that other code needs to know of it is in its signature, or beside its name (`TRAITS`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dimat.merge.stages import Accepted, Aligned, Repaired, Weights
from dimat.registry import Registry

CONTEXT = frozenset(
    {
        "base",
        "aux",
        "names",
        "generator",
        "state",
        "model",
        "spec",
        "data",
        "score",
        "points",
        "observer",
        "reference",
        "repair",
        "put_away",
        "models",
        "mixing",
    }
)
"""Keyword arguments that the pipeline fills; they can never be options."""

TRAITS: Mapping[str, Any] = {
    "statistics": None,
    "pays": None,
    "then": "",
    "base_with": None,
    "holds": "tensors",
    "lora_products": False,
    "adds_ranks": False,
    "linear": False,
}
"""The traits of a combine method, with the values of those that it does not give.

`statistics`: how an agent takes the statistics that the method asks for as `aux` (`dimat.merge.shared_statistics`); it
gets those of the method's options that it has by the same name.
`pays`: (model, inputs) → whether agents merge such a model by it unless told otherwise; of a preset's `on_data`.
`then`: the method of further exchanges after one training; "" for itself.
`base_with`: the option with which it needs the base that it asks for; None: it always does.
`holds`: what it keeps in memory while it merges mapped files: "pieces" of each tensor, one of the "tensors" of each
model, or the "deltas" of all models.
`lora_products`: it merges the products of LoRA factors, of whatever ranks. `adds_ranks`: to the sum of their ranks.
`linear`: it is a weighted mean, so that merging again is one merge with other weights.
"""

align_registry: Registry[Aligned] = Registry(
    "align method", "dimat.merge.align", context=CONTEXT, traits={"idle": False}
)
"""`idle`: the method moves nothing, whatever it is given."""


def no_tensors(model: nn.Module) -> frozenset[str]:
    """Return no names: for a repair that re-estimates nothing."""
    return frozenset()


combine_registry: Registry[Weights] = Registry("combine method", "dimat.merge.combine", context=CONTEXT, traits=TRAITS)
repair_registry: Registry[Repaired] = Registry(
    "repair method",
    "dimat.merge.repair",
    context=CONTEXT,
    traits={"idle": False, "renews": no_tensors, "statistics": None},
)
"""`idle`: the method mends nothing. `renews`: (model) → names of the tensors that it makes anew, whatever the merge
made of them. `statistics`: as of a combine method."""
accept_registry: Registry[Accepted] = Registry("accept rule", "dimat.merge.accept", context=CONTEXT)


def is_mean(method: str) -> bool:
    """Tell whether a combine method is a weighted mean, so that what goes with weights can be averaged as they are."""
    return method in combine_registry.names() and bool(combine_registry.traits(method)["linear"])


def product_methods() -> list[str]:
    """Return the combine methods that merge products of LoRA factors, sorted."""
    return [name for name in combine_registry.names() if combine_registry.traits(name)["lora_products"]]
