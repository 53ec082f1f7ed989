"""Experiment trackers as sinks of metrics: W&B, TensorBoard, MLflow, trackio and those of the user."""
