"""Tensor maths that combine methods share: streaming, task vectors, spheres, spectra.

Knows no models, no matching, no files.
"""
