"""Kinds of PEFT adapters: which can be merged, how, and why others cannot.

Averaging trained tensors averages their effects if a layer changes in proportion to them. LoRA's factors are merged as
their products; for other kinds whose parts multiply each other, the mean of the parts is not the mean of the effects.
"""

from __future__ import annotations

SUMS = frozenset(("IA3", "LN_TUNING", "BEFT", "PROMPT_TUNING", "TRAINABLE_TOKENS", "FOURIERFT", "C3A", "SHIRA"))
"""Kinds whose changes are in proportion to what is trained: factors of activations, norms, biases, rows of embeddings,
coefficients of fixed waves, circulant blocks, single entries."""
MERGED = SUMS | {"LORA"}
"""Kinds that can be merged: those, and LoRA as products."""
PRODUCTS = frozenset(
    ("LOHA", "LOKR", "ADALORA", "VERA", "PVERA", "RANDLORA", "DELORA", "VBLORA", "XLORA", "POLY", "HIRA", "GRALORA")
)
TURNS = frozenset(("OFT", "BOFT", "HRA", "ROAD", "PSOFT"))
PLACES = {
    "IA3": ("feedforward_modules",),
    "FOURIERFT": ("random_loc_seed", "n_frequency", "n_frequency_pattern", "scaling"),
    "C3A": ("block_size", "block_size_pattern"),
    "SHIRA": ("r", "mask_type", "random_seed"),
    "PROMPT_TUNING": ("num_virtual_tokens",),
    "TRAINABLE_TOKENS": ("token_indices",),
}
"""Settings that say where and how strongly what is trained counts, by kind: equal in adapters that can be merged."""


def why_not(kind: str) -> str:
    """Return why adapters of a kind cannot be merged, "" if they can."""
    if kind in MERGED:
        return ""
    if kind in PRODUCTS or kind == "DoRA":
        return "its trained parts multiply each other, and the mean of factors is not the mean of their products"
    if kind in TURNS:
        return "it rotates weights, and the mean of rotations is not a rotation"
    return "dimat does not know whether the mean of its weights gives the mean of their effects"
