"""One agent: its round protocol, the drivers that run it for real, its own learning.

Knows no simulator.
"""
