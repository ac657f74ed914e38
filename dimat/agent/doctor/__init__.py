"""`dimat doctor`: checks of an agent's machine, files and network.

Changes nothing.
"""
