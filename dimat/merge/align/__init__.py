"""Second stage of a merge, one method a file: peers' units into this agent's order.

No network, no files.
"""
