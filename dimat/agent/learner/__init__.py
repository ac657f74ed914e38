"""One agent's model on its own machine: train, record, merge, checkpoint.

Knows no network and no daemon.
"""
