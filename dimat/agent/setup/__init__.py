"""From a configuration to an agent that can run: its task, schedule and round machine.

Knows no daemon and no simulator.
"""
