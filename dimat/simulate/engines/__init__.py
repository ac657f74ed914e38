"""The engines that train and merge for simulated agents: a pool of worker processes.

They do not know virtual time.
"""
