"""Which unit of a peer is which of this agent's, by activations or by weights.

Knows no pipeline, no network, no files.
"""
