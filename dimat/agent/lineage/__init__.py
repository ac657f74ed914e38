"""Who contributed what to a model: records of merges, signed manifests, their verification.

Knows no training and no daemon.
"""
