"""Version 1 of the wire protocol.

Generated from proto/ by `make proto`.
"""
