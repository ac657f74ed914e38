"""Connections to peers: dial, say hello, follow their snapshots, make single calls.

Knows nothing of training and merging.
"""
