"""The loss barrier between two models on disk: measured, and shown."""
