"""Reports to read after a run: HTML page, plots, CSV, lineage.

Reads results and logs; runs nothing.
"""
