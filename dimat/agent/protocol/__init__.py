"""The round as a pure state machine, with its messages, state and mixing weights.

No I/O, no clock, no torch, no other room of `agent`.
"""
