"""Training from Python: scripts and notebooks write code, data and config of a run, and start it."""
