"""Fourth stage of a merge, one method a file: mend what averaging broke.

No network, no files.
"""
