"""Keys, certificates and identities of agents.

Knows nothing of transfers.
"""
