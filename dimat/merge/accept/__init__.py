"""Last stage of a merge, one method a file: keep the merge, or back off.

No network, no files.
"""
