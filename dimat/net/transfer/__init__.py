"""Snapshots between agents: offer, upload, fetch, resume, keep.

Knows nothing of rounds and merges.
"""
