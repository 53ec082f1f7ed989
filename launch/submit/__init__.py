"""Submission of runs as jobs: exactly once, with a snapshot of the code."""
