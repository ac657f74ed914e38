"""Lines, tables and live panels on a terminal.

It receives events and results, and runs nothing.
"""
