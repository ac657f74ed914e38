"""Models run for a merge: batches, Fisher diagonals, Gram matrices, learned coefficients.

Knows no pipeline, no network, no files.
"""
