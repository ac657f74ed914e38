"""How far a merge goes, in which tensors: `merge.layers`, and the outer step, `merge.outer`.

Combined weights are first held back by layer, then the outer step goes from own weights towards them:

    θ'_t ← θ_own,t + f_t (θ_combined,t − θ_own,t),  θ ← step(θ_own, θ')

with f_t in [0, 1] the factor of tensor t: 0 keeps it own, as a personal head (FedPer, Arivazhagan et al. 2019, arXiv
1912.00818) or own normalisation layers (FedBN, Li et al. 2021, arXiv 2102.07623). Both come before the repair, which
is to describe the weights that are kept: running statistics that it re-estimates are re-estimated whatever their f_t.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import Field

from dimat.errors import ConfigError, nearest
from dimat.merge.accept.no_worse import between
from dimat.merge.lora.factors import find_pairs
from dimat.merge.natures import Natures
from dimat.merge.registry import CONTEXT
from dimat.merge.stages import Weights
from dimat.registry import Registry

outer_registry: Registry[Weights] = Registry("outer step", context=CONTEXT)
"""step(own, merged, *, lr, …) -> Weights; nothing that is given is changed."""


@outer_registry.register("none")
def none(own: Weights, merged: Weights, *, lr: Annotated[float, Field(gt=0, le=1)] = 1.0) -> Weights:
    """Return own + lr (merged − own), the merged weights themselves for lr = 1: a step without momentum.

    Of LoRA factors it is the point between their products (`between`).
    """
    return between(own, merged, lr) if lr < 1 else merged


def layer_factors(
    layers: Mapping[str, float], names: Collection[str], natures: Natures, *, products: bool = False
) -> dict[str, float]:
    """Return the factor of each tensor that has one below 1.

    `layers`: pattern of names (as in a shell: `*`, `?`, `[…]`) → factor; the last pattern that matches a tensor counts.
    `products`: the combine method merges products of LoRA factors. Raises ConfigError for a pattern that matches
    nothing, naming what is nearest, and where one tensor of two names, or a pair of LoRA factors that are merged as
    one, would be treated in two ways.
    """
    found = dict.fromkeys(names, 1.0)
    for pattern, factor in layers.items():
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            modules = {f"{name[:i]}.*" for name in names for i, letter in enumerate(name) if letter == "."}
            raise ConfigError(
                f"merge.layers: no tensor of the model is called {pattern!r}{nearest(pattern, [*names, *modules])}"
            )
        found |= dict.fromkeys(matched, factor)
    together = [(name, first, "are one tensor") for name, first in natures.first.items()]
    if products and layers:
        together += [(pair.a, pair.b, "are merged as their product") for pair in find_pairs(names)]
    for one, other, why in together:
        if one in found and other in found and found[one] != found[other]:
            raise ConfigError(
                f"merge.layers: {one} and {other} {why}, and have different factors, {found[one]:g} and "
                f"{found[other]:g}; give both the same"
            )
    return {name: factor for name, factor in found.items() if factor < 1}


def held_back(own: Weights, merged: Weights, factors: Mapping[str, float]) -> Weights:
    """Return merged weights with each tensor of `factors` only so far on the way from own; at 0 own's, bit for bit."""
    if not factors:
        return merged
    result = dict(merged)
    for factor in {*factors.values()}:
        names = [name for name in factors if factors[name] == factor and name in result]
        ours = {name: own[name] for name in names}
        theirs = {name: result[name] for name in names}
        result |= between(ours, theirs, factor) if factor else {name: t.detach().clone() for name, t in ours.items()}
    return result
