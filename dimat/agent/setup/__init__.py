"""From a configuration to a resolved experiment, and to an agent that can run.

Knows no daemon and no simulator: both resolve an experiment here.
"""
