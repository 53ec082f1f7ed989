"""Training from Python: a script or a notebook writes a run's code, data and config, and starts the launcher."""
