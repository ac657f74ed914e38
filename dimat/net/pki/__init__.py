"""Keys, certificates and identities of agents.

This package does not depend on transfers.
"""
