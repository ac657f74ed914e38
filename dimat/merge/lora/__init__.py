"""LoRA adapters: pairs of factors, their products, their ranks as units.

Knows no pipeline, no network, no files.
"""
