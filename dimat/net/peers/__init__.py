"""Connections to peers: dial, greet, follow what they publish, ask single questions.

Knows nothing of training and merging.
"""
