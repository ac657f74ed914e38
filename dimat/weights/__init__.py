"""Weights on disk and in transfer: safetensors headers, snapshots, encodings.

Knows no network and no models.
"""
