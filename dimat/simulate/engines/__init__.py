"""The engines that train and merge for simulated agents: a pool of worker processes.

Know no virtual time.
"""
