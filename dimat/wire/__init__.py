"""The messages that agents exchange, generated from proto/.

Edit proto/, then run `make proto`.
"""
