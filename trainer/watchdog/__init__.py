"""Watchdog: notice that a run makes no progress, name the rank that is behind, end the attempt."""
