"""Tools for finding a fault in a run."""
