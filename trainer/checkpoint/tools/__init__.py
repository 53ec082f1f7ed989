"""`everstep checkpoint`: list, verify, compare, export and remove checkpoints."""
