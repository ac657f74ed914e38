"""LoRA adapters side by side: the exact mean of their products, at the sum of their ranks."""

from __future__ import annotations

from collections.abc import Sequence

from dimat.merge.lora.factors import Factors, concatenated, merge_products
from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.task_vectors import Number


@combine_registry.register("lora-concat", lora_products=True, adds_ranks=True)
def lora_concat(own: Weights, peers: Sequence[Weights], weights: Sequence[float], *, scaling: Number = 1.0) -> Weights:
    """Return LoRA factors B = [α w_1 B_1, α w_2 B_2, …] and A = [A_1; A_2; …], so that B·A = α Σ_k w_k B_k A_k.

    Exact, at rank Σ_k r_k: A (Σr, in), B (out, Σr), α = `scaling`. `weights` (own first, sum 1) multiply each model's
    ΔW = s·B·A; a model of weight 0 takes no part, and the factors of one that is alone are the result. Tensors that
    are no LoRA factors (biases, modules that were trained whole) are averaged. As own's shapes change, it cannot
    merge models in training: there take "lora-svd". See `dimat.merge.lora.factors` for names, shapes and scales.
    Raises MergeError for a factor without the other, factors that do not fit, and values that are not finite.
    """

    def merge(_: Factors, parts: list[Factors], mixing: list[float]) -> Factors:
        return parts[0] if len(parts) == 1 else concatenated(parts, [scaling * weight for weight in mixing])

    return merge_products(own, peers, weights, merge)
