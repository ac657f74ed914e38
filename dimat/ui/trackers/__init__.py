"""Experiment trackers fed by events: TensorBoard, W&B, MLflow, Prometheus.

Each tracker's library is imported only where it is used.
"""
