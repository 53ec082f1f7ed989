"""Watchdog: notice that a run gets no further, name the rank that keeps the others waiting, and end the attempt."""
