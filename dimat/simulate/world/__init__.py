"""The simulated world: virtual clock, links, computers, faults, scenario.

Trains nothing.
"""
