"""Lines, tables and live panels on a terminal.

Gets events and results; runs nothing.
"""
