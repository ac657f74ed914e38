"""What a person sees on a terminal: lines, tables and live panels.

Is told through events and results; runs nothing.
"""
