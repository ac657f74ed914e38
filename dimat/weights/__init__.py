"""Weights at rest and on the way: safetensors headers, snapshots, encodings.

Knows no network and no models.
"""
