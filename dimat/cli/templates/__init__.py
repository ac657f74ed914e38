"""The files that `dimat init` writes.

Text only: no torch, no network.
"""
