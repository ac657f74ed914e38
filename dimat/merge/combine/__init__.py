"""Third stage of a merge, one method a file: one set of weights out of several.

No network, no files.
"""
